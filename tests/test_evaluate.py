"""Chapter 6: the answers' measures, wins, errors, the table, the samples and evaluation.json."""

import contextlib
import json
import math
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TINY

import evaluate
from evaluate import (
    Answers,
    JudgeError,
    Settings,
    answer,
    ask,
    ask_once,
    judge_answers,
    judge_question,
    judge_table,
    mean_and_error,
    parse_verdict,
    read_verdicts,
    retry_after,
    side_by_side,
    summarise,
    table,
    tally,
    wins,
    wins_by_length,
)
from model import GPT, Pairs, Tokenizer, UserError, generate, gold_reward, mixed_seed, save_model
from reward import RewardModel

END = 256
BYTES = Tokenizer([chr(byte) for byte in range(END)], r"[\s\S]", {"<end>": END}, END)
KEYS = ("gold_reward", "reward", "win_rate_vs_chosen", "win_rate_vs_sft", "kl", "length", "ended")
ENDS = ("", "_se", "_low", "_high")
ASKED = ("How do I paint my old chair?", "I want to sell my red lamp.", "Move it.", "Clean the big drum?")
QUESTIONS = [f"\n\nHuman: {question}\n\nAssistant:" for question in ASKED]


def make_model(kind, seed):
    torch.manual_seed(seed)
    return kind(replace(TINY, vocabulary=END + 1))


@pytest.fixture
def sft():
    return make_model(GPT, 0)


@pytest.fixture
def other():
    return make_model(GPT, 1)


@pytest.fixture
def judge():
    return make_model(lambda config: RewardModel(GPT(config)), 2)


@pytest.fixture
def prompts():
    return [torch.tensor(BYTES.encode(question)) for question in QUESTIONS]


@pytest.fixture
def settings():
    return Settings(max_new_tokens=10, temperature=0.7, seed=3)


def make_pairs(source="toy"):
    pieces = [[BYTES.encode(question), [*b" Good luck with it!", END], [*b" No.", END]] for question in QUESTIONS]
    tokens = torch.tensor([token for pair in pieces for piece in pair for token in piece], dtype=torch.int32)
    gold = torch.tensor([[0.5, -0.25]] * 4) if source == "toy" else None
    return Pairs(tokens, torch.tensor([[len(piece) for piece in pair] for pair in pieces]), BYTES, source, None, gold)


def made_answers(gold):
    """Two answers with numbers worked by hand below."""
    return Answers(
        ["Sand the chair first.", "Offer the lamp to a friend."],
        torch.tensor([1.0, 3.0]) if gold else None,
        torch.tensor([0.0, 4.0]),
        torch.tensor([2.0, 6.0]),
        torch.tensor([10.0, 20.0]),
        torch.tensor([1.0, 0.0]),
    )


def plain_hidden(model, prompt, response):
    tokens = torch.cat((prompt, response))[None]
    length = tokens.shape[1]
    mask = [(length, torch.ones(length, length, dtype=torch.bool).tril())]
    return model(tokens, torch.arange(length)[None], mask)[0]


def plain_logprob(policy, prompt, response):
    """log π(response | prompt), token by token, with nothing packed."""
    logits = plain_hidden(policy, prompt, response) @ policy.embedding.weight.T
    before = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum(before[t, token].item() for t, token in enumerate(response.tolist()))


def test_wins_count_a_tie_one_half():
    ours, theirs = torch.tensor([2.0, 1.0, 1.5]), torch.tensor([1.0, 2.0, 1.5])
    assert wins(ours, theirs).tolist() == [1.0, 0.0, 0.5]


def test_mean_and_error_by_hand():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error √(14/3 / 4) = √(7/6). One value: error 0."""
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7 / 6), abs=1e-6)
    assert mean_and_error(torch.tensor([5.0])) == (5.0, 0.0)


def test_kl_of_sft_from_itself_is_0(settings, prompts, sft, judge):
    assert answer(settings, prompts, BYTES, "toy", sft, sft, judge).kl.tolist() == [0.0] * 4


@torch.no_grad()
def test_kl_is_the_sum_of_log_ratios_at_temperature_1(settings, prompts, sft, other, judge):
    """Though the answers are sampled at 0.7. The same seed samples the same answers here."""
    responses = generate(other, prompts, END, 10, 0.7, mixed_seed(3, 500_000))
    expected = [
        plain_logprob(other, prompt, response) - plain_logprob(sft, prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    given = answer(settings, prompts, BYTES, "toy", other, sft, judge)
    assert min(map(abs, expected)) > 0.1
    assert given.kl.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("source", ["toy", "hh"])
def test_answers_hold_text_gold_reward_length_and_end_of_each_prompt(monkeypatch, prompts, sft, judge, source):
    """Fixed answers, in another order of length than packing's: one helpful, one cut off, one empty, one polite."""
    texts = [" Sand the chair first.", " What a", "", " Great question!"]
    responses = [torch.tensor([*text.encode(), *([] if text == " What a" else [END])]) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda *_: responses)
    given = answer(Settings(max_new_tokens=30), prompts, BYTES, source, sft, sft, judge)
    assert given.texts == texts
    assert given.length.tolist() == [23.0, 7.0, 1.0, 17.0]
    assert given.ended.tolist() == [1.0, 0.0, 1.0, 1.0]
    rewards = [
        judge.head(plain_hidden(judge.trunk, *document)[-1]).item() for document in zip(prompts, responses, strict=True)
    ]
    assert given.reward.tolist() == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    if source == "toy":
        assert given.gold.tolist() == [1.0, -0.25, 0.0, 0.5]
        assert given.gold.tolist() == [gold_reward(*pair) for pair in zip(QUESTIONS, texts, strict=True)]
        assert given.judged is given.gold
    else:
        assert given.gold is None
        assert given.judged is given.reward


def test_summary_by_hand():
    """Gold 1, 3 against chosen 1, 3.5: tie, loss: (0.5 + 0) / 2; against SFT's 0, 3: win, tie.
    Of two values the error is half their distance."""
    sft = replace(made_answers(gold=True), gold=torch.tensor([0.0, 3.0]))
    summary = summarise(made_answers(gold=True), sft, torch.tensor([1.0, 3.5]))
    expected = {"gold_reward": 2.0, "gold_reward_se": 1.0, "reward": 2.0, "reward_se": 2.0,
                "win_rate_vs_chosen": 0.25, "win_rate_vs_chosen_se": 0.25, "win_rate_vs_sft": 0.75,
                "win_rate_vs_sft_se": 0.25, "kl": 4.0, "kl_se": 2.0, "length": 15.0, "length_se": 5.0,
                "ended": 0.5, "ended_se": 0.5}  # fmt: skip
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (summary["kl_low"], summary["kl_high"]) == (2.0, 6.0)  # a sample of two values may hold one of them twice
    assert set(summary) == {f"{key}{end}" for key in KEYS for end in ENDS}


def test_summary_without_gold_reward_counts_wins_by_the_reward_model():
    """Rewards 0, 4 against chosen 1, 1 and SFT's 0, 0: one of two, and a tie and a win."""
    sft = replace(made_answers(gold=False), reward=torch.tensor([0.0, 0.0]))
    summary = summarise(made_answers(gold=False), sft, torch.tensor([1.0, 1.0]))
    assert set(summary) == {f"{key}{end}" for key in KEYS for end in ENDS}
    assert summary["gold_reward"] is None
    assert summary["gold_reward_se"] is None
    assert (summary["win_rate_vs_chosen"], summary["win_rate_vs_sft"]) == (0.5, 0.75)


@pytest.mark.parametrize("gold", [True, False])
def test_table_has_a_row_per_policy(gold):
    given = made_answers(gold)
    summary = summarise(given, given, torch.tensor([2.0, 2.0]))
    lines = table({"sft": summary, "dpo": summary, "ppo": summary, "dpo_all": summary}).split("\n")
    assert [line.split()[0] for line in lines] == ["policy", "SFT", "DPO", "MPO", "dpo_all"]
    assert len({len(line) for line in lines}) == 1  # aligned
    for line in lines[1:]:
        assert ("2.00 (1.00 to 3.00)" in line) == gold
        assert ("–" in line) == (not gold)
        for cell in ("2.00 ± 2.00", "50% (50% to 50%)", "4.0 ± 2.0", "15.0 ± 5.0", "50.0%"):
            assert cell in line


def test_wins_by_length_by_hand():
    """SFT's answers: 10 tokens and reward 1 each. Lengths 7 and 8 are under and at 0.8 times that, 12.5 is over."""
    sft = Answers([""] * 5, None, torch.ones(5), torch.zeros(5), torch.full((5,), 10.0), torch.ones(5))
    mine = replace(sft, reward=torch.tensor([2.0, 2, 0, 1, 2]), length=torch.tensor([7.0, 8, 12, 12.5, 30]))
    _, line, zero = wins_by_length({"mine": mine, "sft": sft}, sft).splitlines()
    assert line.split() == "mine 100% of 1 50% of 2 75% of 2".split()
    assert zero.split() == "SFT – 50% of 5 –".split()


@pytest.mark.parametrize("gold", [True, False])
def test_side_by_side_shows_every_policy_on_each_of_the_first_prompts(gold):
    text = side_by_side(make_pairs(), {"sft": made_answers(gold), "mine": made_answers(gold)}, 2)
    marks = ("[+1.00]", "[+3.00]") if gold else ("[+0.00]", "[+4.00]")
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip() not in ("", "Assistant:")]
    assert lines == [
        "Human: How do I paint my old chair?",
        f"SFT {marks[0]} Sand the chair first.",
        f"mine {marks[0]} Sand the chair first.",
        "Human: I want to sell my red lamp.",
        f"SFT {marks[1]} Offer the lamp to a friend.",
        f"mine {marks[1]} Offer the lamp to a friend.",
    ]


def test_side_by_side_shows_no_more_prompts_than_there_are():
    given = replace(made_answers(True), texts=["one", "two", "three", "four"], gold=torch.zeros(4))
    assert side_by_side(make_pairs(), {"sft": given}, 9).count("SFT") == 4
    assert side_by_side(make_pairs(), {"sft": given}, 0) == ""


def test_side_by_side_shows_a_policy_whose_answer_is_empty():
    """A policy that ends at once has an empty text; its line, with name and reward, must not be lost."""
    text = side_by_side(
        make_pairs(), {"sft": made_answers(True), "mine": replace(made_answers(True), texts=["", ""])}, 2
    )
    assert "SFT [+1.00]" in text
    assert "mine [+1.00]" in text


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_command_writes_every_policy_and_sft_ties_with_itself(monkeypatch, tmp_path, capsys, sft, other, judge, source):
    out = Settings(out=str(tmp_path))
    make_pairs(source).save(Settings(out=str(tmp_path)), "test.pt")
    for name, model in (("sft.pt", sft), ("ppo.pt", other), ("reward.pt", judge)):
        out.save = name
        save_model(out, model, BYTES)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", "8"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    summaries = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(summaries) == ["sft", "ppo"]
    for summary in summaries.values():
        assert set(summary) == {f"{key}{end}" for key in KEYS for end in ENDS}
        assert (summary["gold_reward"] is None) == (source == "hh")
    assert summaries["sft"]["kl"] == 0.0
    assert (summaries["sft"]["win_rate_vs_sft"], summaries["sft"]["win_rate_vs_sft_se"]) == (0.5, 0.0)
    assert summaries["ppo"]["kl"] > 0.0
    assert "4 test prompts" in capsys.readouterr().out


# ---- The judge: a chat endpoint on loopback that misbehaves on command ----

MINE = [
    "This is longer than what was chosen.",
    "Short.",
    "Good luck with it!",
    " And this one is the longest of them all.",
]
SFTS = ["Short too.", "This is longer.", "Good luck with it!", "None."]


class Endpoint(ThreadingHTTPServer):
    """`script(number, text)` decides what request `number` (from 0) gets: a string is the judge's reply, a function
    is called with the handler and sends what it likes. `requests` holds (path, headers, body) of each."""

    daemon_threads, block_on_close, script = True, False, None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.requests, self.lock = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class EndpointHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        reply = self.server.script(number, body["messages"][0]["content"])
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            usage = {"prompt_tokens": 70 + number, "completion_tokens": 5}
            reply = sending(200, json.dumps({"choices": [{"message": message}], "usage": usage}))
        reply(self)

    def log_message(self, *_):
        pass


def sending(status, text, claimed=0, **headers):
    """Sends this status and text, and says that it is `claimed` bytes longer than it is."""

    def send(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode()) + claimed), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    return send


def dropping(handler):
    handler.connection.close()


def sleeping(handler):
    """A fine reply, for who waits for it."""
    time.sleep(0.6)
    with contextlib.suppress(OSError):
        sending(200, '{"choices": [{"message": {"content": "Verdict: B"}}]}')(handler)


def always(reply):
    return after(then=reply)


def always_slowly(reply):
    """Leaves the client time to stop."""

    def script(number, text):
        time.sleep(0.02)
        return reply

    return script


def after(*first, then="Verdict: A"):
    """These replies, and then always the same."""
    return lambda number, text: first[number] if number < len(first) else then


def longer(number, text):
    """A judge that takes the longer answer."""
    first, second = (re.search(rf"<{name}>\n(.*)\n</{name}>", text, re.DOTALL)[1] for name in "AB")
    verdict = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "TIE"
    return f"Length decides.\n\nVerdict: {verdict}\n"


class Waits:
    """Stands for the event that stops a run: nobody waits, and it is written down how long."""

    def __init__(self):
        self.seconds = []

    def wait(self, seconds):
        self.seconds.append(seconds)
        return False


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(evaluate, "JUDGE_BACKOFF", 0.001)
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def asking(endpoint, tmp_path):
    return Settings(judge=endpoint.url, judge_model="tester", out=str(tmp_path))


def texts_only(texts):
    return Answers(texts, None, *(torch.zeros(len(texts)) for _ in range(4)))


def judged(settings, mine=MINE, **others):
    """The verdicts on SFT and on one more policy: three comparisons, 6 requests each for the three prompts with
    different answers, and one request for the prompt to which all gave the same."""
    sft = texts_only(SFTS)
    return judge_answers(settings, make_pairs("hh"), {"sft": sft, "mine": texts_only(mine), **others}, sft)


def rows_of(settings):
    with open(f"{settings.out}/judge.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("text, verdict", [
    ("Verdict: A", "A"), ("It is kinder.\nVerdict: B", "B"), ("One.\n\n  Verdict: TIE \n\n", "TIE"),
    ("Verdict: A\nVerdict: B", "B"), ("", None), ("A", None), ("verdict: A", None), ("Verdict: C", None),
    ("Verdict: A or B", None), ("Verdict: A\nI hope this helps.", None), ("So my Verdict: A", None),
    ("Verdict: A.", None), ("**Verdict: A**", None),
])  # fmt: skip
def test_a_verdict_is_the_last_line_in_the_form_asked_for(text, verdict):
    assert parse_verdict(text) == verdict


def test_retry_after_is_seconds():
    texts = "7", "0", "-3", "nan", "soon", "", None, "Wed, 21 Oct 2026 07:28:00 GMT"
    assert [retry_after(text) for text in texts] == [7, 0, 0, 0, 0, 0, 0, 0]


def test_the_question_holds_prompt_and_answers_in_order_and_its_key_tells_them_apart():
    dialogue, post = "\n\nHuman: {Paint} it?\n\nAssistant:", "POST: I {owe} a friend money.\n\nTL;DR:"
    key, text = judge_question("m", dialogue, " {first} one", "second one ")
    assert text.index("{Paint} it?") < text.index("<A>\n{first} one\n</A>") < text.index("<B>\nsecond one\n</B>")
    assert "conversation" in text and "Reddit" not in text
    summary = judge_question("m", post, "one", "two")
    assert "Reddit" in summary[1] and "I {owe} a friend" in summary[1] and "conversation" not in summary[1]
    others = [judge_question("m", dialogue, "second one", "{first} one"), judge_question("n", dialogue, "{first} one",
              "second one"), judge_question("m", post, "{first} one", "second one")]  # fmt: skip
    others.append(judge_question("m", "Paint?", "{first} one", "second one"))
    assert len({key, *(other for other, _ in others)}) == 5
    assert judge_question("m", dialogue, "{first} one", "second one") == (key, text)  # space around does not matter


def test_another_wording_of_the_question_has_other_keys(monkeypatch):
    before = judge_question("m", "Paint?", "one", "two")[0]
    monkeypatch.setattr(evaluate, "JUDGE_FRAME", evaluate.JUDGE_FRAME.replace("Say in one sentence", "Say"))
    assert judge_question("m", "Paint?", "one", "two")[0] != before


def test_tally_by_hand():
    """Win in both orders, loss in both, both TIE, always the first place, a win and a TIE, and two without a verdict:
    1, 0, ½, ½, ½; variance (¼ + ¼) / 4, error √(1/8 / 5)."""
    row = tally([("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A"), ("A", "TIE"), (None, "A"), (None, None)])
    assert row == {"win_rate": 0.5, "win_rate_se": pytest.approx(math.sqrt(1 / 40)), "prompts": 5, "ties": 3,
                   "orders_disagree": 2, "decisions": 7, "first_place_wins": 5, "no_verdict": 2}  # fmt: skip
    assert tally([(None, "A")])["win_rate"] is None


def test_judge_table_has_a_row_for_each_opponent_and_none_for_sft_against_itself():
    row = tally([("A", "B"), ("B", "A"), ("A", "A"), ("A", "TIE"), (None, "A")])
    lines = judge_table({("sft", "chosen"): row, ("sft", "sft"): tally([]), ("mine", "sft"): tally([(None, None)])})
    header, first, second = lines.split("\n")
    assert re.split(r"  +", first) == ["SFT", "chosen", "50% (15% to 85%)", "2", "2", "71% of 7", "1"]
    assert re.split(r"  +", second) == ["mine", "SFT", "–", "0", "0", "–", "1"]
    assert len(header) == len(first) == len(second)


def test_a_request_holds_the_question_and_nothing_else(endpoint, asking):
    endpoint.script = always("Verdict: A")
    judged(asking, secret=texts_only(MINE))
    for path, headers, body in endpoint.requests:
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        assert set(body) == {"model", "messages", "temperature", "max_tokens"}
        assert (body["model"], body["temperature"], len(body["messages"])) == ("tester", 0, 1)
        assert "secret" not in json.dumps(body) and "sft" not in json.dumps(body)
    assert len(endpoint.requests) == 19  # two policies with the same answers are one question


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_url_may_be_the_base_or_all_of_it(endpoint, asking, ending):
    endpoint.script = always("Verdict: B")
    assert ask_once(replace(asking, judge=endpoint.url + ending), "x")["verdict"] == "B"
    assert endpoint.requests[0][0] == "/v1/chat/completions"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_https_and_the_key(endpoint, asking, tmp_path, monkeypatch):
    files = "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"
    kind = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", "req", "-x509", *kind.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    endpoint.socket = context.wrap_socket(endpoint.socket, server_side=True)
    endpoint.script = always("Verdict: TIE")
    asking = replace(asking, judge=endpoint.url.replace("http", "https"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    with pytest.raises(JudgeError, match="CERTIFICATE_VERIFY_FAILED"):
        ask_once(asking, "x")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert ask_once(asking, "x")["verdict"] == "TIE"
    assert endpoint.requests[0][1]["Authorization"] == "Bearer sk-very-secret"


FAILURES = {
    "429": sending(429, '{"error": {"message": "slow down"}}', Retry_After="0"),
    "500": sending(500, "oops"),
    "half an error": sending(503, "half", claimed=10),
    "408": sending(408, ""),
    "sleep": sleeping,
    "nonsense": sending(200, "<html>welcome</html>"),
    "other JSON": sending(200, '{"choices": []}'),
    "a list": sending(200, "[1]"),
    "deep": sending(200, "[" * 100_000),
    "content of a wrong kind": sending(200, '{"choices": [{"message": {"content": [1]}}]}'),
    "half a body": sending(200, '{"choices": [{"message": {"content": "Verdict: B"}}]}', claimed=5),
    "dropped": dropping,
    "no HTTP": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
    "no verdict": "I would rather not say.",
    "null": sending(200, '{"choices": [{"message": {"content": null}}]}'),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_asked_again(endpoint, asking, monkeypatch, name):
    """Twice it fails, the third attempt is fine."""
    monkeypatch.setattr(evaluate, "JUDGE_TIMEOUT", 0.15 if name == "sleep" else 5.0)
    endpoint.script = after(FAILURES[name], FAILURES[name])
    given = ask(asking, "x", threading.Event())
    assert given == {"verdict": "A", "prompt_tokens": 72, "completion_tokens": 5}
    assert len(endpoint.requests) == 3


def test_the_wait_doubles_with_jitter_and_is_at_least_what_the_server_asks(endpoint, asking, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGE_BACKOFF", 1.0)
    endpoint.script = after(*[sending(500, "")] * 3, sending(429, "", Retry_After="7"), "no verdict")
    waits = Waits()
    ask(asking, "x", waits)
    for seconds, least in zip(waits.seconds[:3], (0.5, 1.0, 2.0), strict=True):
        assert least <= seconds <= 3 * least
    assert 7 + 4 <= waits.seconds[3] <= 7 + 12
    assert waits.seconds[4] == 0  # the judge is there, it only has to be asked again
    assert len({seconds / 2**number for number, seconds in enumerate(waits.seconds[:3])}) == 3


def test_attempts_have_a_limit_and_a_wait_has_one(endpoint, asking):
    endpoint.script = always(sending(500, "oops"))
    with pytest.raises(JudgeError, match="500 Internal Server Error: oops"):
        ask(asking, "x", Waits())
    assert len(endpoint.requests) == evaluate.JUDGE_ATTEMPTS
    endpoint.script = always(sending(429, "", Retry_After="86400"))
    with pytest.raises(JudgeError, match="429"):
        ask(asking, "x", Waits())
    assert len(endpoint.requests) == evaluate.JUDGE_ATTEMPTS + 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_stops_at_once_with_what_the_server_said(endpoint, asking, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    said = json.dumps({"error": {"message": "I do not know\nsk-wrong."}})
    endpoint.script = always_slowly(sending(status, said, Location=endpoint.url))
    with pytest.raises(UserError) as error:
        judged(replace(asking, judge_parallel=1))
    assert str(error.value).startswith(f"--judge {endpoint.url}/chat/completions: the server said {status} ")
    assert "I do not know (the key). (check URL, --judge-model and OPENAI_API_KEY)" in str(error.value)
    assert len(endpoint.requests) <= 3  # the next may be under way before the first refusal is read
    assert rows_of(asking) == []


def test_a_server_that_is_not_there_stops_after_the_first_question(asking, endpoint):
    endpoint.script = always_slowly(dropping)
    with pytest.raises(UserError, match=r"--judge .* the connection failed \((RemoteDisconnected|Connection)"):
        judged(replace(asking, judge_parallel=1))
    assert len(endpoint.requests) <= evaluate.JUDGE_ATTEMPTS + 2


def test_a_server_that_goes_away_stops_the_run_and_what_it_said_is_kept(asking, endpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGE_ATTEMPTS", 2)
    gone = always_slowly(sending(502, "gone"))
    endpoint.script = lambda number, text: "Verdict: A" if number < 5 else gone(number, text)
    with pytest.raises(UserError, match=r"the server said 502 Bad Gateway: gone; questions in a row .*: 8"):
        judged(asking)
    assert len(rows_of(asking)) == 5


def test_a_judge_that_says_a_of_everything_makes_ties_only(endpoint, asking, capsys):
    endpoint.script = always("Verdict: A")
    added = judged(asking)
    counts = {"prompts": 4, "ties": 4, "orders_disagree": 4, "decisions": 8, "first_place_wins": 8, "no_verdict": 0}
    assert added["mine"] == {"judge": "tester", "win_rate_judge_vs_chosen": 0.5, "win_rate_judge_vs_chosen_se": 0.0,
                             "judge_vs_chosen": counts, "win_rate_judge_vs_sft": 0.5, "win_rate_judge_vs_sft_se": 0.0,
                             "judge_vs_sft": counts}  # fmt: skip
    assert added["sft"]["win_rate_judge_vs_sft"] is None and added["sft"]["win_rate_judge_vs_chosen"] == 0.5
    assert re.search(r"^mine +chosen +50% .* 4 +4 +100% of 8 +0$", capsys.readouterr().out, re.MULTILINE)


def test_a_judge_of_length_gives_the_known_win_rates(endpoint, asking):
    """Against chosen: longer, shorter, the same, longer; against SFT's: longer, shorter, the same, longer."""
    endpoint.script = longer
    added = judged(asking, only_first=texts_only([MINE[0], "", "", ""]))
    assert added["mine"]["win_rate_judge_vs_chosen"] == 0.625
    assert added["mine"]["win_rate_judge_vs_chosen_se"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert added["mine"]["win_rate_judge_vs_sft"] == 0.625
    assert added["mine"]["judge_vs_sft"] == {"prompts": 4, "ties": 1, "orders_disagree": 0, "decisions": 6,
                                             "first_place_wins": 3, "no_verdict": 0}  # fmt: skip
    assert added["only_first"]["win_rate_judge_vs_sft"] == 0.25
    assert added["sft"]["win_rate_judge_vs_chosen"] == 0.125  # shorter, shorter, the same, shorter


def test_nothing_is_asked_twice(endpoint, asking, capsys):
    endpoint.script = longer
    first = judged(asking)
    rows = rows_of(asking)
    asked = len(endpoint.requests)
    assert asked == len(rows) == len({row["key"] for row in rows}) == 19
    assert {row["order"] for row in rows} == {"policy first", "policy second"}
    assert sorted(row["prompt_tokens"] for row in rows) == list(range(70, 70 + asked))
    assert "19 requests to the judge tester, 0 of them known" in capsys.readouterr().out
    assert judged(asking) == first
    assert len(endpoint.requests) == asked and rows_of(asking) == rows
    assert re.search("19 requests .*, 19 of them known .* about 0 input tokens", capsys.readouterr().out)
    judged(asking, ["Something new, and very much longer.", *MINE[1:]])
    assert len(endpoint.requests) == asked + 4
    judged(replace(asking, judge_model="another"))
    assert len(endpoint.requests) == 2 * asked + 4


def test_every_verdict_is_in_the_file_before_the_next_request(endpoint, asking):
    kept = []

    def script(number, text):
        kept.append(len(rows_of(asking)))
        return longer(number, text)

    endpoint.script = script
    judged(replace(asking, judge_parallel=1))
    assert kept == list(range(19))


def test_half_a_line_at_the_end_costs_one_question(endpoint, asking, tmp_path):
    endpoint.script = longer
    first = judged(asking)
    path = tmp_path / "judge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    asked = len(endpoint.requests)
    assert judged(asking) == first
    assert len(endpoint.requests) == asked + 1
    assert judged(asking) == first  # the line after the half one can be read
    assert len(endpoint.requests) == asked + 1


def test_what_is_no_verdict_in_the_file_is_passed_over(tmp_path):
    lines = ['{"key": "a", "verdict": "A"}', "[1]", '{"key": "b"}', '{"key": "c", "verdict": ["A"]}', "7", "", "{",
             '{"key": "d", "verdict": "MAYBE"}', '{"key": [], "verdict": "B"}']  # fmt: skip
    lines.append('{"key": "e", "verdict": "TIE"}')
    (tmp_path / "judge.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{")
    assert read_verdicts(tmp_path / "judge.jsonl") == {"a": "A", "e": "TIE"}
    assert read_verdicts(tmp_path / "other.jsonl") == {}


def test_ctrl_c_keeps_what_was_asked(endpoint, asking, capsys):
    """The fifth request presses it; the one under way beside it is waited for and kept too."""

    def script(number, text):
        if number == 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1 if number >= 4 else 0)
        return longer(number, text)

    endpoint.script = script
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            judged(replace(asking, judge_parallel=2))
    finally:
        signal.signal(signal.SIGINT, before)
    asked = len(endpoint.requests)
    assert 5 <= asked <= 12 and len(rows_of(asking)) == asked
    assert "judge.jsonl keeps all verdicts" in capsys.readouterr().out
    endpoint.script = longer
    assert judged(asking)["mine"]["win_rate_judge_vs_chosen"] == 0.625
    assert len(endpoint.requests) == 19


def test_no_verdict_is_reported_left_out_and_asked_again(endpoint, asking, capsys):
    def script(number, text):
        return "They are both fine.\nVerdict: BOTH" if f"<B>\n{MINE[0]}" in text else longer(number, text)

    endpoint.script = script
    added = judged(asking)
    asked = 17 + 2 * evaluate.JUDGE_ATTEMPTS
    assert len(endpoint.requests) == asked
    for opponent in ("chosen", "sft"):  # shorter, the same, longer are left
        counts = added["mine"][f"judge_vs_{opponent}"]
        assert (counts["prompts"], counts["no_verdict"]) == (3, 1)
        assert added["mine"][f"win_rate_judge_vs_{opponent}"] == 0.5
    out = capsys.readouterr().out
    assert "no verdict on 2 of 19 requests; the last: the reply does not end in a verdict" in out and "BOTH" in out
    endpoint.script = longer
    assert judged(asking)["mine"]["win_rate_judge_vs_chosen"] == 0.625
    assert len(endpoint.requests) == asked + 2


def test_a_judge_that_never_gives_a_verdict_is_not_asked_for_ever(endpoint, asking, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGE_ATTEMPTS", 2)
    endpoint.script = always_slowly("Hello!")
    with pytest.raises(UserError, match=r"the reply does not end in a verdict: 'Hello!'; questions in a row .*: 8"):
        judged(replace(asking, judge_parallel=1))
    assert len(endpoint.requests) <= (evaluate.JUDGE_PATIENCE + 1) * evaluate.JUDGE_ATTEMPTS


def test_many_questions_without_a_verdict_that_are_not_in_a_row_do_not_stop_it(endpoint, asking, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGE_ATTEMPTS", 1)
    failures = FAILURES["null"], FAILURES["500"]

    def script(number, text):
        time.sleep(0.01)
        return longer(number, text) if number % 2 else failures[number % 4 // 2]

    endpoint.script = script
    judged(replace(asking, judge_parallel=1))
    assert len(endpoint.requests) == 19 and len(rows_of(asking)) == 9


def test_as_many_requests_as_allowed_are_under_way_at_once(endpoint, asking):
    together, under_way, most = threading.Barrier(3, timeout=1.0), [], []

    def script(number, text):
        under_way.append(number)
        most.append(len(under_way))
        if number < 3:
            together.wait()
        under_way.remove(number)
        return longer(number, text)

    endpoint.script = script
    judged(replace(asking, judge_parallel=3))
    assert max(most) == 3


@pytest.mark.parametrize("price", [None, 2.5])
def test_tokens_and_cost_are_said_before_the_first_request(endpoint, asking, capsys, price):
    said = []

    def script(number, text):
        said.append(capsys.readouterr().out)
        return longer(number, text)

    endpoint.script = script
    judged(replace(asking, judge_parallel=1, judge_price=price))
    tokens = sum(len(body["messages"][0]["content"]) for _, _, body in endpoint.requests) / 4
    assert f"19 requests to the judge tester, 0 of them known from {asking.out}/judge.jsonl" in said[0]
    assert f"about {tokens:,.0f} input tokens (estimated: 4 characters a token)" in said[0]
    expected = "price is not known (--judge-price)" if price is None else f"for ${tokens * 2.5 / 1e6:.2f}, replies"
    assert expected in said[0]


@pytest.mark.parametrize("flags, said", [
    ({"judge": "http://x/v1"}, "--judge-model"), ({"judge_model": "m"}, "--judge URL"),
    ({"judge": "x/v1", "judge_model": "m"}, "'x/v1': not a URL"), ({"judge": "", "judge_model": "m"}, "not a URL"),
    ({"judge": "ftp://x/v1", "judge_model": "m"}, "not a URL"), ({"judge": "http://", "judge_model": "m"}, "not a URL"),
    ({"judge": "http://x:y/v1", "judge_model": "m"}, "not a URL"),
    ({"judge": "http://x/ v1", "judge_model": "m"}, "not a URL"),
    ({"judge": "http://me:word@x/v1", "judge_model": "m"}, "not a URL"),
])  # fmt: skip
def test_a_mistake_in_the_judges_flags_is_said_at_once(flags, said):
    with pytest.raises(UserError, match=said):
        Settings(**flags)


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "x" * 70])
def test_a_host_that_cannot_be_is_one_line(asking, host):
    with pytest.raises(JudgeError, match="the connection failed"):
        ask_once(replace(asking, judge=f"http://{host}/v1"), "x")


def test_a_key_that_cannot_be_sent_is_refused_where_there_is_a_judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my key")
    Settings()
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Settings(judge="http://x/v1", judge_model="m")


def test_command_with_a_judge_adds_its_numbers_and_goes_on_where_it_was_stopped(
    monkeypatch, tmp_path, capsys, endpoint, sft, other, judge
):
    out = Settings(out=str(tmp_path))
    make_pairs("hh").save(out, "test.pt")
    for name, model in (("sft.pt", sft), ("ppo.pt", other), ("reward.pt", judge)):
        out.save = name
        save_model(out, model, BYTES)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", "8"]
    flags += ["--judge", endpoint.url, "--judge-model", "tester", "--prompts", "3"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    endpoint.script = after(*["Verdict: TIE"] * 5, then=sending(401, "no more"))
    with pytest.raises(UserError, match="401 Unauthorized: no more"):
        evaluate.main()
    without = json.loads((tmp_path / "evaluation.json").read_text())  # the other numbers are not lost
    assert len(rows_of(out)) == 5
    endpoint.script, endpoint.requests[:] = always("Verdict: TIE"), []
    evaluate.main()
    assert len(endpoint.requests) == 3 * 2 * 3 - 5  # the same answers, so what is known is known
    summaries = json.loads((tmp_path / "evaluation.json").read_text())
    for name, summary in summaries.items():
        assert without[name].items() <= summary.items()
        assert (summary["win_rate_judge_vs_chosen"], summary["win_rate_judge_vs_chosen_se"]) == (0.5, 0.0)
        assert summary["win_rate_judge_vs_sft"] == (None if name == "sft" else 0.5)
    assert re.search(r"^MPO +SFT +50% ", capsys.readouterr().out, re.MULTILINE)
