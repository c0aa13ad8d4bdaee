"""What the stock `openai` client makes of the gateway. Arguments: its URL, and the keys that it printed."""

import sys

import openai

url, everything, small, trial, capped, reader = sys.argv[1:]


def client(key):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(key, model="echo-small", content="hello there", **more):
    messages = [{"role": "user", "content": content}]
    return client(key).chat.completions.create(model=model, messages=messages, **more)


def raises(kind, code, call):
    try:
        call()
    except kind as error:
        assert error.code == code, error.code
        return error
    raise AssertionError(f"no {kind.__name__}")


answer = ask(everything)
assert answer.choices[0].message.content == "hello there"
assert answer.usage.total_tokens == 4

parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
answer = ask(everything, content=parts, max_tokens=1)
assert answer.choices[0].message.content == "in "
assert answer.choices[0].finish_reason == "length"

chunks = list(ask(everything, content="one two three", stream=True))
assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "one two three"
assert chunks[-1].choices[0].finish_reason == "stop"
with_usage = {"include_usage": True}
*chunks, last = ask(everything, content="one two", stream=True, stream_options=with_usage)
assert [chunk.usage for chunk in chunks] == [None, None]
assert (last.choices, last.usage.total_tokens) == ([], 4)

assert [model.id for model in client(everything).models.list()] == ["echo-small", "echo-large"]
assert [model.id for model in client(small).models.list()] == ["echo-small"]

raises(openai.AuthenticationError, "invalid_api_key", lambda: ask("tak_live_wrong"))
raises(openai.PermissionDeniedError, "model_not_allowed", lambda: ask(small, model="echo-large"))
raises(openai.PermissionDeniedError, "insufficient_permissions", lambda: ask(reader))
raises(openai.NotFoundError, "model_not_found", lambda: ask(everything, model="nothing"))
raises(openai.BadRequestError, "invalid_request", lambda: ask(everything, max_tokens=-1))

outcomes = []
for _ in range(5):
    try:
        ask(trial)
        outcomes.append(200)
    except openai.RateLimitError as error:
        assert error.code == "rate_limit_exceeded", error.code
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert error.response.headers["ratelimit"].startswith('"minute";r=0;t=')
        outcomes.append(429)
# Two a minute, and two more if it has ended in between.
assert outcomes[:2] == [200, 200] and 429 in outcomes, outcomes

# A cent a day: one request may hold 0.0129 cents, and none 1.5 cents.
ask(capped)
error = raises(
    openai.RateLimitError, "insufficient_quota", lambda: ask(capped, max_tokens=30_000)
)
assert "resets at 20" in error.message, error.message
assert int(error.response.headers["retry-after"]) <= 86_400

print("all is well")
