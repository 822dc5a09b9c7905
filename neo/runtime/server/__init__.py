"""``neo serve``: an OpenAI-compatible HTTP process in front of an engine process.

The engine loop runs in a process of its own (``engine_process``); the HTTP process (``app``) talks to it over
a socket pair with msgpack messages (``messages``), one batched message a step. Tokens become text in the HTTP
process. Each side notices when the other is gone: its end of the socket closes.
"""
