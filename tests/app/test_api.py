"""The HTTP API as its users see it: real HTTP, the official client, scripted engines."""

import asyncio

import httpx
import openai
import pytest
import tiny_tokenizer
from api_server import CHAT, COMPLETION, MODEL, events, in_thread, post, saying, serving, tokenizer, tokens
from scripted_engine import ScriptedGroup

from actors import wire

ANSWER = "the quick brown fox 😀 jumps over 世界"


@pytest.fixture(scope="module")
def server():
    with ScriptedGroup(script=saying(ANSWER)) as group, serving(group) as it:
        yield it


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as it:
        yield it


# --- answers ------------------------------------------------------------------------------------------------------


def test_models(server, client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 1000)
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion(client):
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=200)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (ANSWER, "stop", None)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == len(tokens("hello"))
    assert usage.completion_tokens == len(tokens(ANSWER)) + 1  # the end of the sequence counts
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.object == "chat.completion"
    rendered = asyncio.run(tokenizer().encode_chat(CHAT))
    assert answer.usage.prompt_tokens == len(rendered)


def test_streams_add_up_to_the_whole_and_never_split_a_character(client):
    texts = []
    for chunk in client.completions.create(model=MODEL, prompt="hello", max_tokens=200, stream=True):
        texts.append(chunk.choices[0].text)
    assert "".join(texts) == ANSWER and len(texts) > 5
    assert not any("\ufffd" in text for text in texts)
    assert chunk.choices[0].finish_reason == "stop" and chunk.usage is None

    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == ANSWER
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["stop"]


def test_async_streaming(server):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number):
                stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, seed=number)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(20)))

    assert asyncio.run(scenario()) == [ANSWER] * 20


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_comes_last_when_asked_for(server, path):
    prompt = {"prompt": "hello"} if path == "/v1/completions" else {"messages": CHAT}
    chunks = events(server, path, **prompt, max_tokens=5, stream_options={"include_usage": True})
    *others, last = chunks
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in events(server, path, **prompt, max_tokens=5)[0]


def test_length_is_bounded(client):
    answer = client.completions.create(model=MODEL, prompt="hello")
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=3, max_tokens=7)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_lists_of_prompts_of_both_kinds_and_several_choices(client):
    texts = ["the fox", "one two"]
    with ScriptedGroup() as group, serving(group) as echoing:  # here the model says the prompt again
        for prompt in (texts, [tokens(text) for text in texts]):
            answer = post(echoing, COMPLETION, prompt=prompt, n=3, max_tokens=len(tokens("the fox"))).json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(6))
            assert [choice["text"][:3] for choice in answer["choices"]] == ["the"] * 3 + ["one"] * 3
            assert answer["usage"]["prompt_tokens"] == sum(len(tokens(text)) for text in texts)
        answer = post(echoing, COMPLETION, prompt=tokens("the fox"), max_tokens=3).json()
        assert len(answer["choices"]) == 1
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, n=3, stream=True)
    by_index = {0: "", 1: "", 2: ""}
    for chunk in answer:
        for choice in chunk.choices:
            by_index[choice.index] += choice.delta.content or ""
    assert set(by_index.values()) == {ANSWER}


def test_choices_have_seeds_of_their_own_and_a_request_its_seed(server):
    def seeds(**body):
        before = {submit.request_id for submit in server.group.submits}
        assert post(server, "/v1/completions", prompt="x", max_tokens=1, **body).status_code == 200
        return [submit.sampling.seed for submit in server.group.submits if submit.request_id not in before]

    assert len(set(seeds(n=3, seed=7))) == 3 and 7 in seeds(n=3, seed=7)
    assert set(seeds(n=3, seed=7)) == set(seeds(n=3, seed=7))
    assert seeds() != seeds()
    assert seeds(seed=-1)[0] > 0


def test_echo(server):
    answer = post(server, "/v1/completions", prompt="hello ", echo=True, max_tokens=200).json()
    assert answer["choices"][0]["text"] == "hello " + ANSWER
    chunks = events(server, "/v1/completions", prompt=tokens("hello "), echo=True, max_tokens=200)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello " + ANSWER


# --- stops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["x 😀 j", ["nowhere", "x 😀 j"], "umps ov"])
def test_a_stop_string_over_several_tokens_ends_the_text_and_the_request(server, client, stop):
    expected = ANSWER[: ANSWER.index(stop if isinstance(stop, str) else stop[-1])]
    assert len(tokens(ANSWER)) > len(tokens(expected)) + 1
    with ScriptedGroup(script=saying(ANSWER, eos=False)) as group, serving(group) as endless:
        answer = post(endless, "/v1/completions", prompt="hello", stop=stop, max_tokens=900).json()
        assert answer["choices"][0] == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "stop"}
        chunks = events(endless, "/v1/chat/completions", messages=CHAT, stop=stop, max_tokens=900)
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        group.wait(lambda: len(set(group.aborted)) == 2)


def test_what_only_looked_like_a_stop_string_is_shown(client):
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=200, stop="世界!")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")


def test_stop_strings_wait_for_min_tokens(client):
    count = len(tokens("the quick brown"))
    answer = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=200, stop=["quick", "jumps"], extra_body={"min_tokens": count}
    )
    assert answer.choices[0].text == ANSWER[: ANSWER.index("jumps")]


def test_a_stop_token_is_not_shown(server, client):
    stop = tokens(ANSWER)[4]
    answer = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=200, extra_body={"stop_token_ids": [stop]}
    )
    assert answer.choices[0].text == tokenizer().decode(tokens(ANSWER)[:4])
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 5


def test_the_end_of_the_sequence_can_be_ignored(server):
    body = {"prompt": "x", "max_tokens": len(tokens(ANSWER)) + 10, "ignore_eos": True}
    choice = post(server, "/v1/completions", **body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    shown = post(server, "/v1/completions", **body, skip_special_tokens=False).json()["choices"][0]
    assert "</s>" in shown["text"] and "</s>" not in choice["text"]


# --- what reaches the engine --------------------------------------------------------------------------------------


def test_sampling_fields_reach_the_engine(server, client):
    client.completions.create(
        model=MODEL,
        prompt="hello",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        seed=42,
        extra_body={"top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "stop_token_ids": [9]},
    )
    sampling = max(server.group.submits, key=lambda submit: submit.sampling.seed == 42).sampling
    assert sampling == wire.SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.125,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        seed=42,
        logit_bias={5: -100.0},
        min_tokens=2,
        eos_token_ids=(tiny_tokenizer.EOS, tiny_tokenizer.PAD),
        stop_token_ids=(9,),
    )


def test_defaults_are_openais(server):
    post(server, "/v1/completions", prompt="hello", seed=4711)
    (sampling,) = [submit.sampling for submit in server.group.submits if submit.sampling.seed == 4711]
    eos = (tiny_tokenizer.EOS, tiny_tokenizer.PAD)
    assert sampling == wire.SamplingParams(max_tokens=16, temperature=1.0, seed=4711, eos_token_ids=eos)


def test_the_bodies_that_benchmark_clients_send_are_served(server):
    common = {
        "model": MODEL,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    chunks = events(server, "/v1/completions", **common, prompt="hello", max_tokens=6)
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    content = [{"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": content}]
    chunks = events(server, "/v1/chat/completions", **common, messages=messages, max_completion_tokens=6)
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_a_request_may_name_its_rank(server):
    before = len(server.group.engines[1].submits)
    for _ in range(3):
        assert post(server, "/v1/completions", prompt="x", max_tokens=1, data_parallel_rank=1).status_code == 200
    assert len(server.group.engines[1].submits) == before + 3
    answer = post(server, "/v1/completions", prompt="x", data_parallel_rank=5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data_parallel_rank")


# --- logprobs -----------------------------------------------------------------------------------------------------


def test_completion_logprobs(client):
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=6, logprobs=3)
    logprobs = answer.choices[0].logprobs
    count = 6
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * count
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(count)]
    assert all(top[token] == -0.5 for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))
    chosen_only = client.completions.create(model=MODEL, prompt="hello", max_tokens=6, logprobs=0).choices[0].logprobs
    assert chosen_only.top_logprobs is None and chosen_only.token_logprobs == [-0.5] * count


def test_streamed_completion_logprobs_continue_their_offsets(client):
    whole = client.completions.create(model=MODEL, prompt="hello", max_tokens=200, logprobs=2).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(model=MODEL, prompt="hello", max_tokens=200, logprobs=2, stream=True)
    ]
    assert [token for part in parts if part for token in part.tokens] == whole.tokens
    assert [offset for part in parts if part for offset in part.text_offset] == whole.text_offset


def test_chat_logprobs(client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=200, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert bytes(byte for entry in content[:-1] for byte in entry.bytes).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in content)
    assert content[0].top_logprobs[0].token == content[0].token
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=200, logprobs=True, stream=True)
    entries = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == [entry.token for entry in content]
    assert entries[0].top_logprobs == []
    assert client.chat.completions.create(model=MODEL, messages=CHAT).choices[0].logprobs is None


def test_a_new_epoch_under_load_changes_no_answer():
    with ScriptedGroup(ranks=3, step_s=0.004, script=saying(ANSWER, eos=False)) as group, serving(group) as server:
        results = []

        def one():
            chunks = events(server, COMPLETION, prompt="a", max_tokens=300)
            results.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

        threads = [in_thread(one) for _ in range(9)]
        group.wait(lambda: server.client.running == 9)
        group.change([0, 1], engines_too=False)
        group.change([0, 1])
        group.change([1])
        for thread in threads:
            thread.join()
        whole = tokenizer().decode([saying(ANSWER, eos=False)([], i) for i in range(300)])
        assert len(results) == 9 and all(whole.startswith(result) for result in results)
        assert all(len(whole) - len(result) <= 1 for result in results)  # a character cut by the length is not shown


# --- the other endpoints ------------------------------------------------------------------------------------------


def test_health_ping_version(server):
    for path in ("/health", "/ping"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]


def test_health_says_what_the_caller_says():
    with ScriptedGroup() as group, serving(group, status=lambda: "the manager is away") as server:
        response = httpx.get(f"{server.url}/health")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "the manager is away")


def test_load(server):
    server.group.loads = {1: wire.Load(1, 9, 9, 3, 4, 5, 60)}
    server.group.publish()
    server.group.wait(lambda: server.client.loads[1].waiting == 3)
    load = httpx.get(f"{server.url}/load").json()
    assert load["ranks"][1] == {"rank": 1, "waiting": 3, "running": 4, "kv_used": 5, "kv_total": 60}
    assert (load["epoch"], load["server_load"], load["missing"]) == (1, 0, [])


def test_tokenize_and_back(server):
    text = "hello 😀 world"
    answer = post(server, "/tokenize", prompt=text).json()
    assert answer == {"count": len(tokens(text)), "max_model_len": 1000, "tokens": tokens(text)}
    assert post(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    chat = post(server, "/tokenize", messages=CHAT).json()["tokens"]
    assert post(server, "/detokenize", tokens=chat).json()["prompt"] == "<|user|>hello world\n<|assistant|>"
    assert post(server, "/tokenize").status_code == 400
    assert post(server, "/detokenize", tokens=[10**7]).status_code == 400


def test_metrics():
    with ScriptedGroup() as group, serving(group) as server:
        group.loads = {0: wire.Load(0, 1, 1, 3, 4, 5, 60)}
        group.publish()
        group.wait(lambda: server.client.loads[0].waiting == 3)
        post(server, COMPLETION, prompt=[5, 6, 7], max_tokens=11, n=2)
        post(server, COMPLETION, prompt="a", temperature=9)
        text = httpx.get(f"{server.url}/metrics").text
    for line in (
        "accordion_prompt_tokens_total 3.0",
        "accordion_generated_tokens_total 22.0",
        'accordion_requests_total{finish_reason="length"} 2.0',
        'accordion_errors_total{status="400"} 1.0',
        "accordion_time_to_first_token_seconds_count 2.0",
        "accordion_request_seconds_count 2.0",
        "accordion_requests_running 0.0",
        'accordion_rank_waiting{rank="0"} 3.0',
        'accordion_rank_kv_used{rank="0"} 5.0',
        "accordion_epoch 1.0",
        "accordion_ranks 2.0",
    ):
        assert line in text.splitlines(), line


def test_tokens_that_came_together_share_an_event():
    with ScriptedGroup(script=saying("the fox ", eos=False), tokens_per_step=8) as group, serving(group) as server:
        chunks = events(server, COMPLETION, prompt="a", max_tokens=64)
        assert len(chunks) <= 8
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith("the fox the fox")
