"""Talk to neo through the official client: an answer as it comes, and what it cost.

neo serve &
pip install openai
python examples/chat.py "What is a KV cache?"
"""

import argparse
import sys

import openai

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--key", default="none", help="the server's --api-key")
args = parser.parse_args()

client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.key)
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": args.question}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print()
        used = chunk.usage
        print(f"{model}: {used.prompt_tokens} + {used.completion_tokens} tokens", file=sys.stderr)
