"""What the engine's process says of its steps: a message a step, or one for several short ones.

A step in which each request got a token and nothing else happened is *plain*: the engine has its tokens as a
list, and no object is made of them in its process. Short plain steps of the same requests share a message
every ``SHARE_S`` or ``TINY_SHARE_S``, so that the engine does not spend its time on talking. No token is held
back over a step that may take longer than those before it; first tokens, ends and whatever else is more than
a token are never held back. How often the engine listens is apart from that: every ``LISTEN_S``.
"""

from __future__ import annotations

from collections.abc import Sequence

from neo.core.graph import StepGraph
from neo.core.record import StepRow
from neo.core.request import Request, Tier
from neo.runtime.engine import Engine, Output
from neo.runtime.server.channel import Channel
from neo.runtime.server.messages import Event, Logprobs, StepInfo, Update
from neo.runtime.server.watching import LIKE, StepWatch

SHORT_S = 0.0015
"""Seconds below which a step is short. A message takes 30 to 60 us with what it wakes: 4 % of this."""
SHARE_S = 0.004
"""Seconds that a token of a short step may wait for those behind it: 250 messages in a second are plenty."""
TINY_S = 0.0004
"""Seconds below which a step is tiny: messages every 4 ms, which take 0.1 ms each with all that they need and
wake, would be 2.5 % of them beside what is noted of each step, which is 1 % already."""
TINY_SHARE_S = 0.02
"""Seconds that a token of a tiny step may wait: it comes with 50 others of its request or more."""
LISTEN_S = 0.002
"""Seconds for which a message to the engine may wait while steps are short: asking for it takes some 2 us."""
_EMBED = 1  # of a graph's works: the embedding's, which has all tokens


class Reports:
    """Tells the HTTP process what steps brought.

    Attributes:
        keys: by request id, of the requests that somebody listens to.
        accepted: Add messages handled so far.
        events: to be told with the next message.
        due: it is time to listen.
    """

    def __init__(self, engine: Engine, channel: Channel, watch: StepWatch) -> None:
        self.engine = engine
        self.channel = channel
        self.watch = watch
        self._record = watch.record
        self.keys: dict[str, int] = {}
        self.requests: dict[int, Request] = {}
        self.accepted = 0
        self.events: list[Event] = []
        self.due = True
        self._share = not engine.options.ahead  # ahead, the next step is known too late
        self._told_s = 0.0  # end of the last step that was told
        self._listen_s = 0.0  # between steps that end earlier nobody listens
        self._ids: tuple[str, ...] | None = None  # of the requests in the plain steps that wait
        self._keys: list[int] = []
        self._tokens: list[list[int]] = []
        self._rows: list[StepRow] = []  # of these steps: what they say is made out when it is told
        self._like: StepRow = ()  # what the rows have in common
        self._graph: StepGraph | None = None  # of the last of them
        engine.on_start = self._starting
        engine.brief = True

    def add(self, key: int, request: Request) -> None:
        """Somebody listens to a request from now on."""
        self.keys[request.id] = key
        self.requests[key] = request

    def forget(self, key: int) -> Request | None:
        """Nobody does any more; None if nobody did."""
        request = self.requests.pop(key, None)
        if request is not None:
            del self.keys[request.id]
        return request

    def step(self, outputs: Sequence[Output], handled: bool) -> None:
        """Tell what a step brought, now or with the next ones; ``handled``: messages came before it.

        Outputs of a plain step are taken from the engine.
        """
        record = self._record
        row, record.last = record.last, None
        plain = self.engine.plain
        if plain is None or row is None or handled or self.events or plain[0] != self._ids:
            self.flush()
            self._tell(outputs, row, handled)
            return
        if row[LIKE] != self._like:
            self.flush()
            self._like = row[LIKE]
        if self.watch.learns:
            self.watch.note_price()
        self._tokens.append(plain[1])
        self._rows.append(row)
        self._graph = record.graph
        begin, end = row[0], row[1]
        seconds = end - begin
        wait_s = SHARE_S if seconds >= TINY_S else TINY_SHARE_S
        talk = seconds >= SHORT_S or end - self._told_s >= wait_s or not self._share
        if talk:
            self.flush()
        self.due = talk or end >= self._listen_s
        if self.due:
            self._listen_s = end + LISTEN_S

    def flush(self) -> None:
        """Send what waits."""
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            rows, self._rows = self._rows, []
            self.watch.add(rows, self._graph)
            self._send(self._keys, tokens, [], self.watch.info(more=True), rows[-1][1])

    def rest(self) -> None:
        """The engine has no work: say all that is known of its steps."""
        self.flush()
        info = self.watch.rest()
        if info is not None:
            self._send([], [], [], info, None)

    def _starting(self, graph: StepGraph) -> None:
        """A step begins: one that may take longer than those before it must not keep their tokens."""
        if self._tokens:
            before = self._graph  # other operations than its, or more tokens
            if (
                before is None
                or graph.template is not before.template
                or graph.works[_EMBED][0] > before.works[_EMBED][0]
            ):
                self.flush()

    def _tell(self, outputs: Sequence[Output], row: StepRow | None, handled: bool) -> None:
        """A message for a single step, or for none."""
        keys: list[int] = []
        tokens: list[int] = []
        events, self.events = self.events, []
        plain = self.engine.plain
        if plain is not None:
            outputs = list(map(Output, *plain))
        for output in outputs:
            key = self.keys.get(output.request_id)
            if key is None:
                continue  # aborted: nobody listens
            bare = output.finish_reason is None and output.logprobs is None
            if bare and output.token is not None and self.requests[key].generated > 1:
                keys.append(key)
                tokens.append(output.token)
            else:
                events.append(self._event(key, output))
        self._ids = plain[0] if plain is not None and len(keys) == len(plain[0]) else None
        self._keys = keys
        self.due = True
        if keys or events or handled or row is not None:
            info = None
            if row is not None:
                self._like = row[LIKE]
                self.watch.note_price()
                self.watch.add([row], self._record.graph, alone=True)
                info = self.watch.info(more=False)
            self._send(keys, [tokens] if keys else [], events, info, None if row is None else row[1])

    def _send(
        self,
        keys: list[int],
        tokens: list[list[int]],
        events: list[Event],
        info: StepInfo | None,
        end_s: float | None,
    ) -> None:
        view = self.engine.scheduler.view
        waiting = len(view.waiting)
        pools = view.pools
        self.channel.send(
            Update(
                keys,
                tokens,
                events,
                self.accepted,
                self.engine.scheduler.unfinished - waiting,
                waiting,
                (pools[Tier.GPU].used, pools[Tier.CPU].used),
                info,
            )
        )
        if end_s is not None:
            self._told_s = end_s

    def _event(self, key: int, output: Output) -> Event:
        request = self.requests[key]
        event = Event(key, output.token, detail=output.detail)
        if output.logprobs is not None:
            given = output.logprobs
            event.logprobs = Logprobs(given.token_logprob, given.rank, list(given.top))
        if request.generated <= 1 and request.scheduled_s is not None:
            event.queued_s = max(0.0, request.scheduled_s - request.arrival_s)
        if output.finish_reason is not None:
            event.reason = str(output.finish_reason)
            del self.requests[key], self.keys[output.request_id]
        return event
