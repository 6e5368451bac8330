"""Chapter 6: the answers' measures, means and intervals, tables, talk, the judge, the picture and evaluation.json."""

import contextlib
import io
import json
import math
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import evaluate
from evaluate import Settings, answer, ask, differences, judge, mean_and_error, summarise, t_interval, table, tally
from model import GPT, Pairs, UserError, generate, gold_reward, mixed_seed, save_model, train_tokenizer
from reward import RewardModel, wilson_interval

TOKENIZER = train_tokenizer(["Sand the chair first. Good luck with it!"], 257)  # the bytes and the end token
END = TOKENIZER.end
KEYS = ("gold_reward", "reward", "win_rate_vs_chosen", "win_rate_vs_sft", "kl", "length", "ended")
ENDS = ("", "_se", "_low", "_high")
ASKED = ("How do I paint my old chair?", "I want to sell my red lamp.", "Move it.", "Clean the big drum?")
QUESTIONS = [f"\n\nHuman: {question}\n\nAssistant:" for question in ASKED]
PROMPTS = [torch.tensor(TOKENIZER.encode(question)) for question in QUESTIONS]
CHOSEN = "Good luck with it!"


def make_model(kind, seed):
    torch.manual_seed(seed)
    policy = GPT(replace(TINY, vocabulary=TOKENIZER.size))
    return policy if kind is GPT else kind(policy)


SFT, OTHER, SCORER = make_model(GPT, 0), make_model(GPT, 1), make_model(RewardModel, 2)
SETTINGS = Settings(max_new_tokens=10, temperature=0.7, seed=3)


def make_pairs(source="toy", repeat=1):
    parts = [[*TOKENIZER.encode(text), END] for text in (f" {CHOSEN}", " No.")]
    pieces = [[TOKENIZER.encode(question), *parts] for question in QUESTIONS * repeat]
    tokens = torch.tensor([token for pair in pieces for piece in pair for token in piece], dtype=torch.int32)
    lengths = torch.tensor([[len(piece) for piece in pair] for pair in pieces])
    gold = torch.tensor([[0.5, -0.25]] * len(pieces)) if source == "toy" else None
    return Pairs(tokens, lengths, TOKENIZER, source, None, gold)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, flags)])
    evaluate.main()


def made_in(folder, **flags):
    """Settings that write files which go back to the same data."""
    settings = Settings(out=str(folder), **flags)
    settings.origin = "0123456789abcdef", "pairs.pt"
    return settings


@pytest.fixture
def out(tmp_path):
    """A folder with SFT, a policy and a reward model."""
    for name, model in (("sft.pt", SFT), ("ppo.pt", OTHER), ("reward.pt", SCORER)):
        save_model(made_in(tmp_path, save=name), model, TOKENIZER)
    return tmp_path


# ---- Answers ----


def plain_logprob(policy, prompt, response):
    """log π(response | prompt), token by token, with nothing packed."""
    logits = policy(torch.cat((prompt, response))) @ policy.vocabulary_weight.T
    before = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum(before[place, token].item() for place, token in enumerate(response.tolist()))


@torch.no_grad()
def test_kl_is_the_sum_of_log_ratios_at_temperature_1():
    """Though the answers are sampled at 0.7. The same seed samples the same answers here. SFT has none from itself."""
    responses = generate(OTHER, PROMPTS, END, 10, 0.7, mixed_seed(3, 500_000))
    both = list(zip(PROMPTS, responses, strict=True))
    expected = [plain_logprob(OTHER, *one) - plain_logprob(SFT, *one) for one in both]
    texts, columns = answer(SETTINGS, make_pairs(), OTHER, SFT, SCORER)
    assert min(map(abs, expected)) > 0.1
    assert columns["kl"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert texts == [TOKENIZER.decode(response.tolist()).strip() for response in responses]
    assert answer(SETTINGS, make_pairs(), SFT, SFT, SCORER)[1]["kl"].tolist() == [0.0] * 4


@torch.no_grad()
@pytest.mark.parametrize("source", ["toy", "hh"])
def test_answers_hold_text_gold_reward_length_and_end_of_each_prompt(monkeypatch, source):
    """Fixed answers, in another order of length than packing's: one helpful, one cut off, one empty, one polite."""
    texts = [" Sand the chair first.", " What a", "", " Great question!"]
    responses = [torch.tensor(TOKENIZER.encode(text) + [END] * (text != " What a")) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda *_: responses)
    given, columns = answer(SETTINGS, make_pairs(source), SFT, SFT, SCORER)
    assert given == [text.strip() for text in texts]
    assert columns["length"].tolist() == [23.0, 7.0, 1.0, 17.0]
    assert columns["ended"].tolist() == [1.0, 0.0, 1.0, 1.0]
    rewards = [SCORER.head(SCORER.trunk(torch.cat(both))[-1]).item() for both in zip(PROMPTS, responses, strict=True)]
    assert columns["reward"].tolist() == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    gold = [gold_reward(*both) for both in zip(QUESTIONS, texts, strict=True)]
    assert gold == [1.0, -0.25, 0.0, 0.5]
    assert columns["gold_reward"].tolist() == (gold if source == "toy" else [])


def test_a_measure_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(SCORER, "score", lambda batch: torch.full((len(batch.last),), math.inf))
    with pytest.raises(UserError, match="finite"):
        answer(SETTINGS, make_pairs(), SFT, SFT, SCORER)


# ---- Statistics and tables ----


def test_mean_and_error_by_hand():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error √(14/3 / 4) = √(7/6). One value has no error."""
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(7 / 6)))
    assert mean_and_error(torch.tensor([5.0])) == (5.0, None)


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (511, 1.965)])
def test_intervals_are_students(freedom, t):
    """The 97.5th percentile of a table of t, in units of the standard error, around a mean of 10."""
    values = 10 + torch.arange(freedom + 1.0).double() - freedom / 2
    mean, error = mean_and_error(values)
    low, high = t_interval(values)
    assert mean == pytest.approx(10) and (high - 10) / error == pytest.approx(t, abs=6e-4)
    assert (10 - low) / error == pytest.approx(t, abs=6e-4)
    assert t_interval(torch.ones(freedom + 1)) == (1.0, 1.0) and t_interval(torch.ones(1)) == (None, None)


def test_summary_by_hand():
    """Means take Student's interval, 12.706 times the error of two values; shares take Wilson's; nothing gives null."""
    columns = {"reward": torch.tensor([0.0, 4.0]), "ended": torch.tensor([0.5, 1.0]), "gold_reward": torch.ones(0)}
    summary = summarise({**columns, "kl": torch.tensor([3.0])})
    assert list(summary) == [f"{key}{end}" for key in (*columns, "kl") for end in ENDS]
    values = list(summary.values())
    assert values[:4] == pytest.approx([2.0, 2.0, 2 - 2 * 12.7062, 2 + 2 * 12.7062], rel=1e-5)
    assert values[4:8] == pytest.approx([0.75, 0.25, *wilson_interval(0.75, 2)])
    assert values[8:] == [None] * 4 + [3.0, None, None, None]


def test_table_by_hand():
    numbers = {"gold_reward": (None,) * 4, "reward": (2.0, 0.5, 1.0, 3.0), "win_rate_vs_sft": (0.5, 0.1, 0.25, 0.75)}
    named = {f"{key}{end}": value for key, row in numbers.items() for end, value in zip(ENDS, row, strict=True)}
    single = {f"{key}{end}": None if end else 1.0 for key in numbers for end in ENDS}
    lines = [re.split(r"  +", line) for line in table({"ppo": named, "mine": single}, list(numbers)).split("\n")]
    assert lines == [["policy", "gold reward", "reward", "win rate vs SFT"],
                     ["MPO", "–", "2.00 ± 0.50", "50% (25% to 75%)"],
                     ["mine", "1.00 (– to –)", "1.00 ± –", "100% (–% to –%)"]]


def test_differences_are_paired():
    """MPO − other: 1, 3: 2 ± 1, twice won; SFT's own row is missing. The unpaired error would be 5 and more."""
    values = {"sft": torch.tensor([0.0, 10.0]), "ppo": torch.tensor([1.0, 13.0])}
    header, row = differences(values, "ppo", "prompts").split("\n")
    assert re.split(r"  +", header) == ["MPO against", "lead", "prompts won"]
    assert re.split(r"  +", row) == ["SFT", "+2.00 ± 1.00 (-10.71 to +14.71)", "100% (34% to 100%)"]
    single = differences({name: own[:1] for name, own in values.items()}, "sft", "seeds").split("\n")[1]
    assert re.split(r"  +", single) == ["MPO", "-1.00 ± – (– to –)", "0% (0% to 79%)"]


def test_side_by_side_shows_every_policy_on_the_first_prompts_even_an_empty_answer(capsys):
    texts = {"sft": ["Sand it.", "Sell it.", "", ""], "mine": ["", "No.", "", ""]}
    values = {"sft": torch.tensor([1.0, 3.0, 0, 0]), "mine": torch.tensor([-0.5, 0.0, 0, 0])}
    evaluate.side_by_side(make_pairs(), texts, values, 2)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n") if line not in ("", "Assistant:")]
    assert lines == ["Human: How do I paint my old chair?", "SFT [+1.00] Sand it.", "mine [-0.50] (nothing)",
                     "Human: I want to sell my red lamp.", "SFT [+3.00] Sell it.", "mine [+0.00] No."]
    evaluate.side_by_side(make_pairs(), texts, values, 9)
    assert capsys.readouterr().out.count("SFT") == 4
    evaluate.side_by_side(make_pairs(), texts, values, 0)
    assert capsys.readouterr().out == ""


# ---- The command ----


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_command_writes_every_policy_and_sft_ties_with_itself(monkeypatch, out, capsys, source):
    make_pairs(source, repeat=2).save(made_in(out), "test.pt")  # every prompt twice: answered once
    run_main(monkeypatch, "--out", out, "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", 8)
    summaries = json.loads((out / "evaluation.json").read_text())
    assert list(summaries) == ["sft", "ppo"]
    for summary in summaries.values():
        assert {f"{key}{end}" for key in KEYS for end in ENDS} <= set(summary)
        assert (summary["gold_reward"] is None) == (source == "hh")
    assert (summaries["sft"]["kl"], summaries["sft"]["win_rate_vs_sft"]) == (0.0, 0.5)
    assert summaries["ppo"]["kl"] > 0.0
    printed = capsys.readouterr().out
    assert printed.startswith("4 test prompts") and re.search(r"^SFT  .*%\)$", printed, re.MULTILINE)
    assert re.search(r"paired by prompt\nMPO against .*\nSFT ", printed)  # the last policy's lead


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_wins_by_hand(monkeypatch, out, source):
    """Against chosen ½: win, win, loss, tie; against SFT's 0: win, win, loss, win; by length: 7 tokens are below 0.8
    times SFT's 10, 8 and 12 are not, 12.5 are 1.25 times."""
    make_pairs(source).save(made_in(out), "test.pt")
    judged, other = ("gold_reward", "reward") if source == "toy" else ("reward", "gold_reward")

    def fake(settings, pairs, policy, sft, *_):
        assert settings.max_new_tokens == 96  # the default of a model that was trained here
        own, length = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([7.0, 8.0, 12.0, 12.5])
        own, length = (own, length) if policy is not sft else (own * 0, torch.full((4,), 10.0))
        same = dict.fromkeys(("kl", "ended"), torch.ones(4))
        return [""] * 4, {judged: own, other: torch.zeros(4 if source == "toy" else 0), "length": length, **same}

    monkeypatch.setattr(evaluate, "answer", fake)
    monkeypatch.setattr(evaluate, "score_pairs", lambda *_: torch.tensor([[0.5, 9.0]] * 4))
    run_main(monkeypatch, "--out", out, "--policies", "ppo.pt", "--save", "mine.json", "--samples", 0)
    row = json.loads((out / "mine.json").read_text())["ppo"]
    assert (row["win_rate_vs_chosen"], row["win_rate_vs_sft"]) == (0.625, 0.75)
    assert [row[f"win_rate_vs_sft_{part}"] for part in ("shorter", "as_long", "longer")] == [1.0, 0.5, 1.0]


def test_the_numbers_are_saved_before_they_are_shown(monkeypatch, out):
    make_pairs().save(made_in(out), "test.pt")
    monkeypatch.setattr(evaluate, "table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, "--out", out, "--policies", "sft.pt", "--max-new-tokens", 4)
    assert list(json.loads((out / "evaluation.json").read_text())) == ["sft"]


def test_export_goes_to_the_exporter_and_takes_two_values(monkeypatch, out):
    given = []
    monkeypatch.setattr(evaluate, "export_model", lambda *values: given.extend(map(str, values)), raising=False)
    run_main(monkeypatch, "--out", out, "--export", "ppo.pt", "folder")
    assert given == [str(out / "ppo.pt"), "folder"]
    with pytest.raises(UserError, match="--export"):
        run_main(monkeypatch, "--out", out, "--export", "ppo.pt")


# ---- Talk ----


def test_prompt_prints_every_policys_answer(monkeypatch, out, capsys):
    flags = "--out", out, "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", 12, "--temperature", 0
    run_main(monkeypatch, *flags, "--prompt", ASKED[0])
    printed = capsys.readouterr().out
    responses = [generate(policy, PROMPTS[:1], END, 12, 0.0)[0] for policy in (SFT, OTHER)]
    expected = [TOKENIZER.decode(response.tolist()) for response in responses]
    first, second = printed.split("MPO          ")
    assert first.removeprefix("SFT          ").rstrip("\n") == expected[0].rstrip("\ufffd\n")
    assert second.rstrip("\n") == expected[1].rstrip("\ufffd\n")
    run_main(monkeypatch, *flags, "--prompt", QUESTIONS[0])  # a prompt as in the data is one
    assert capsys.readouterr().out == printed
    with pytest.raises(UserError, match="context"):
        run_main(monkeypatch, *flags, "--prompt", "x" * 500)


def test_prompt_without_a_text_answers_each_line_till_end_of_input(monkeypatch, out, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED[0]}\n\n{'x' * 500}\n{ASKED[1]}\n"))
    asked = []

    def fake(policy, prompts, end, count, temperature, seed, watch):
        if len(prompts[0]) > 200:
            raise UserError("too long")
        asked.append((prompts[0].tolist(), count, seed))

    monkeypatch.setattr(evaluate, "generate", fake)
    run_main(monkeypatch, "--out", out, "--seed", 2, "--prompt", "--model", "sft.pt")
    assert asked == [(PROMPTS[0].tolist(), 96, mixed_seed(2, 0)), (PROMPTS[1].tolist(), 96, mixed_seed(2, 2))]
    printed = capsys.readouterr()
    assert printed.out == "(nothing)\n(nothing)\n" and "too long" in printed.err


def test_a_character_is_shown_once_it_has_all_its_bytes(monkeypatch, capsys):
    pieces, shown = [*TOKENIZER.encode("aé\N{OWL}b"), END], []

    def fake(*_, watch):
        for token in pieces:
            watch(torch.tensor([token]))
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(evaluate, "generate", fake)
    evaluate.reply(SETTINGS, SFT, TOKENIZER, "x", 0)
    assert shown == ["a", "", "é", "", "", "", "\N{OWL}", "b", ""]
    assert capsys.readouterr().out == "\n"


# ---- The judge: a chat endpoint on loopback that misbehaves on command ----

MINE = ["This is longer than what was chosen.", "Short.", CHOSEN, "And this one is the longest of them all."]
SFTS = ["Short too.", "This is longer.", CHOSEN, "None."]


class Endpoint(ThreadingHTTPServer):
    """`script(number, text)` decides what request `number` (from 0) gets: a string is the judge's reply, a function
    is called with the handler and sends what it likes. `requests` holds (path, headers, body) of each."""

    daemon_threads, block_on_close, script = True, False, None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.requests, self.lock = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        pass  # a client that went away


class EndpointHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        reply = self.server.script(number, body["messages"][0]["content"])
        if isinstance(reply, str):
            reply = sending(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))
        reply(self)

    def log_message(self, *_):
        pass


def sending(status, text, **headers):
    def send(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
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


def after(*first, then="Verdict: A"):
    """These replies, and then always the same."""
    return lambda number, text: first[number] if number < len(first) else then


def longer(number, text):
    """A judge that takes the longer answer."""
    first, second = (len(re.search(rf"<{name}>\n(.*)\n</{name}>", text, re.DOTALL)[1].strip()) for name in "AB")
    verdict = "A" if first > second else "B" if first < second else "TIE"
    return f"Length decides.\n\n**Verdict: {verdict}**\n"


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


def judged(settings, mine=MINE, **others):
    """Verdicts on SFT and on one more policy: three comparisons of 3 prompts with different answers, 6 requests each;
    and one request for the prompt to which all gave the same."""
    return judge(settings, make_pairs("hh"), {"sft": SFTS, "mine": mine, **others}, SFTS)


def rows_of(settings):
    with open(f"{settings.out}/judge.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("text, verdict", [
    ("Verdict: A", "A"), ("It is kinder.\nVerdict: B", "B"), ("One.\n\n  Verdict: TIE \n\n", "TIE"),
    ("Verdict: A\nVerdict: B", "B"), ("**Verdict: A**", "A"), ("**Verdict:** B", "B"), ("Verdict: **TIE**.", "TIE"),
    ("verdict: tie.", "TIE"), ("VERDICT: b", "B"), ("", None), ("A", None), ("Verdict: C", None), ("Verdict:", None),
    ("Verdict: A or B", None), ("Verdict: A\nI hope this helps.", None), ("So my Verdict: A", None),
])
def test_a_verdict_is_the_last_line_in_the_form_asked_for(text, verdict):
    assert evaluate.parse_verdict(text) == verdict


def test_tally_by_hand():
    """Win in both orders, loss in both, both TIE, always the first place, a win and a TIE, and two without a verdict:
    1, 0, ½, ½, ½; of 7 places that won, 5 were the first."""
    columns = tally([("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A"), ("A", "TIE"), (None, "A"), (None, None)])
    assert columns["win_rate"].tolist() == [1, 0, 0.5, 0.5, 0.5]
    assert columns["ties"].tolist() == [0, 0, 1, 1, 1]
    assert columns["orders_disagree"].tolist() == [0, 0, 0, 1, 1]
    assert columns["first_place_wins"].tolist() == [1, 0, 0, 1, 1, 1, 1]
    assert columns["no_verdict"].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_request_holds_the_question_and_nothing_else(endpoint, asking):
    endpoint.script = after()
    row = judged(asking, secret=list(MINE))["mine", "chosen"]
    assert (row["win_rate"], row["ties"], row["orders_disagree"], row["first_place_wins"]) == (0.5, 1, 1, 1)
    assert len(endpoint.requests) == 19  # two policies with the same answers are one question
    for path, headers, body in endpoint.requests:
        text = body["messages"][0]["content"]
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        assert set(body) == {"model", "messages", "temperature", "max_tokens"}
        assert (body["model"], body["temperature"], len(body["messages"])) == ("tester", 0, 1)
        assert "secret" not in text and "sft" not in text
        assert text.index("Human: ") < text.index("<A>") < text.index("<B>")


def test_the_key_goes_to_the_server_alone_and_is_never_shown(endpoint, asking, monkeypatch, tmp_path):
    """Not replaced by a .netrc, not sent on by a redirect, not in a message."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    endpoint.script = after(then=sending(307, "sk-very-secret", Location=endpoint.url + "/elsewhere"))
    with pytest.raises(UserError, match=r"307 Temporary Redirect: \(the key\)") as error:
        ask(asking, "x")
    assert "secret" not in str(error.value) and len(endpoint.requests) == 1
    assert endpoint.requests[0][1]["Authorization"] == "Bearer sk-very-secret"


FAILURES = {"429": sending(429, "slow down", Retry_After="0"), "500": sending(500, "oops"), "599": sending(599, ""),
            "408": sending(408, ""), "sleep": sleeping, "dropped": dropping}


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_asked_again(endpoint, asking, monkeypatch, name):
    """Twice it fails, the third attempt is fine."""
    monkeypatch.setattr(evaluate, "JUDGE_TIMEOUT", 0.15 if name == "sleep" else 5.0)
    endpoint.script = after(FAILURES[name], FAILURES[name])
    assert ask(asking, "x") == "A"
    assert len(endpoint.requests) == 3


def test_waits_double_and_the_server_may_ask_for_more(endpoint, asking, monkeypatch):
    waits = []
    stub = SimpleNamespace(sleep=waits.append, time=time.time)
    monkeypatch.setattr("urllib3.util.retry.time", stub)
    monkeypatch.setattr(evaluate, "JUDGE_BACKOFF", 1.0)
    asks = [sending(429, "", Retry_After=seconds) for seconds in ("7", "86400")]
    endpoint.script = after(*[sending(500, "")] * 3, *asks)
    assert ask(asking, "x") == "A"
    assert waits == [2.0, 4.0, 7, 300]


@pytest.mark.parametrize("reply, said", [
    (sending(400, "too long"), "400 Bad Request: too long"), (sending(401, '{"error": "no"}'), "401 Unauthorized"),
    (sending(404, ""), "404 Not Found"), (sending(200, "<html>"), "JSONDecodeError"),
    (sending(200, "[1]"), "TypeError"), (sending(200, '{"choices": []}'), "IndexError"),
])
def test_a_refusal_stops_at_once_with_what_the_server_said(endpoint, asking, reply, said):
    endpoint.script = after(then=reply)
    with pytest.raises(UserError, match=f"--judge {endpoint.url}/chat/completions: {re.escape(said)}.*check URL"):
        judged(replace(asking, judge_parallel=1))
    assert len(endpoint.requests) <= 3  # the next may be under way before the first refusal is read
    assert rows_of(asking) == []


@pytest.mark.parametrize("url", ["localhost/v1", "ftp://x/v1", "http://", "http://x:y/v1", f"http://{'x' * 70}/v1"])
def test_what_is_no_url_is_one_line_at_once(asking, url):
    with pytest.raises(UserError, match=r"--judge .*check URL"):
        ask(replace(asking, judge=url), "x")


@pytest.mark.parametrize("failure, said", [(dropping, "ConnectionError"), (sending(500, "oops"), r"500 .*: oops")])
def test_attempts_have_a_limit(endpoint, asking, failure, said):
    endpoint.script = after(then=failure)
    with pytest.raises(UserError, match=said):
        ask(replace(asking, judge=endpoint.url + "/chat/completions/"), "x")
    assert endpoint.requests[0][0] == "/v1/chat/completions"
    assert len(endpoint.requests) == 1 + evaluate.JUDGE_RETRIES


def test_a_judge_of_length_gives_the_known_win_rates(endpoint, asking):
    """Against chosen: longer, shorter, the same, longer; against SFT's: longer, shorter, the same, longer."""
    endpoint.script = longer
    rows = judged(asking, first=[MINE[0], "", "", ""])
    assert list(rows) == [("sft", "chosen"), ("mine", "chosen"), ("mine", "sft"), ("first", "chosen"), ("first", "sft")]
    assert [row["win_rate"] for row in rows.values()] == [0.125, 0.625, 0.625, 0.25, 0.25]
    mine = rows["mine", "sft"]
    assert mine["win_rate_se"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert (mine["win_rate_low"], mine["win_rate_high"]) == pytest.approx(wilson_interval(0.625, 4))
    assert (mine["ties"], mine["orders_disagree"], mine["first_place_wins"], mine["no_verdict"]) == (0.25, 0, 0.5, 0)


def test_nothing_is_asked_twice(endpoint, asking, capsys):
    endpoint.script = longer
    first, rows, asked = judged(asking), rows_of(asking), len(endpoint.requests)
    assert asked == len(rows) == len({row["question"] for row in rows}) == 19
    assert "is asked 19 of 19 questions" in capsys.readouterr().out
    assert judged(asking) == first
    assert len(endpoint.requests) == asked and rows_of(asking) == rows
    assert re.search("is asked 0 of 19 questions.* about 0 input tokens", capsys.readouterr().out)
    judged(asking, ["Something new, and very much longer.", *MINE[1:]])
    assert len(endpoint.requests) == asked + 4
    judged(replace(asking, judge_model="another"))
    assert len(endpoint.requests) == 2 * asked + 4


def test_half_a_line_in_the_file_is_passed_over(endpoint, asking, tmp_path):
    endpoint.script = longer
    first, path = judged(asking), tmp_path / "judge.jsonl"
    path.write_bytes(path.read_bytes()[:-20] + b"\n")
    assert judged(asking) == first and judged(asking) == first
    assert len(endpoint.requests) == 20


def test_ctrl_c_keeps_what_was_asked(endpoint, asking):
    """The fifth request presses it; the one under way beside it is waited for and kept too. Two go at once: the first
    waits for the second."""
    together = threading.Barrier(2, timeout=1.0)

    def script(number, text):
        together.wait() if number < 2 else None
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
    endpoint.script = longer
    assert judged(asking)["mine", "chosen"]["win_rate"] == 0.625
    assert len(endpoint.requests) == 19


@pytest.mark.parametrize("unreadable", ["They are both fine.\nVerdict: BOTH",
                                        sending(200, '{"choices": [{"message": {"content": null}}]}')])
def test_no_verdict_is_counted_not_asked_again_and_not_kept(endpoint, asking, unreadable):
    endpoint.script = lambda number, text: unreadable if f"<B>\n{MINE[0]}" in text else longer(number, text)
    rows = judged(asking)
    assert len(endpoint.requests) == 19 and len(rows_of(asking)) == 17
    for opponent in ("chosen", "sft"):  # shorter, the same, longer are left
        assert (rows["mine", opponent]["win_rate"], rows["mine", opponent]["no_verdict"]) == (0.5, 0.25)
    endpoint.script = longer
    assert judged(asking)["mine", "chosen"]["win_rate"] == 0.625


@pytest.mark.parametrize("price", [None, 2.5])
def test_the_cost_is_said_first_and_every_verdict_kept_before_the_next_request(endpoint, asking, capsys, price):
    said, kept = [], []

    def script(number, text):
        said.append(capsys.readouterr().out)
        kept.append(len(rows_of(asking)))
        return longer(number, text)

    endpoint.script = script
    judged(replace(asking, judge_parallel=1, judge_price=price))
    tokens = sum(len(body["messages"][0]["content"]) for _, _, body in endpoint.requests) / 4
    expected = "price not known (--judge-price)" if price is None else f"${tokens * 2.5 / 1e6:.2f} without the replies"
    assert f"about {tokens:,.0f} input tokens (4 characters each), {expected}" in said[0]
    assert kept == list(range(19))


@pytest.mark.parametrize("flags, said", [
    ({"judge": "http://x/v1"}, "--judge-model"), ({"judge_model": "m"}, "--judge URL"),
    ({"figure": True}, "pip install"),
    ({"judge": "http://x/v1", "judge_model": "m"}, "torchrun"),
])
def test_a_mistake_in_the_flags_is_said_at_once(flags, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(evaluate, "processes", lambda: (0, 2))
    with pytest.raises(UserError, match=said):
        Settings(**flags)


def test_command_with_a_judge_adds_its_numbers_and_goes_on_where_it_was_stopped(monkeypatch, out, capsys, endpoint):
    make_pairs("hh").save(made_in(out), "test.pt")
    flags = ["--out", out, "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", 8, "--prompts", 3]
    flags += ["--judge", endpoint.url, "--judge-model", "tester", "--judge-parallel", 1]
    endpoint.script = after(*["Verdict: TIE"] * 5, then=sending(401, "no more"))
    with pytest.raises(UserError, match="401 Unauthorized: no more"):
        run_main(monkeypatch, *flags)
    without = json.loads((out / "evaluation.json").read_text())  # the other numbers are not lost
    kept = len(rows_of(Settings(out=str(out))))
    assert kept == 5
    endpoint.script, endpoint.requests[:] = after(then="Verdict: TIE"), []
    run_main(monkeypatch, *flags)
    assert len(endpoint.requests) == 3 * 2 * 3 - kept  # the same answers, so what is known is known
    summaries = json.loads((out / "evaluation.json").read_text())
    for name, summary in summaries.items():
        assert without[name].items() <= summary.items()
        assert (summary["judge_vs_chosen"]["judge"], summary["judge_vs_chosen"]["win_rate"]) == ("tester", 0.5)
        assert ("judge_vs_sft" in summary) == (name == "ppo")
    assert re.search(r"^MPO against sft +50% \(", capsys.readouterr().out, re.MULTILINE)


# ---- The picture ----


@pytest.mark.skipif(evaluate.importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
@pytest.mark.parametrize("source", ["toy", "hh"])
def test_figure(monkeypatch, out, source):
    """Three easy pairs of gap 2, one wrong by gold, and one hard of gap −1; a PPO log of two steps."""
    from matplotlib.figure import Figure

    pairs, kept, drawn = make_pairs(source), Figure.savefig, []
    pairs.save(made_in(out), "test.pt")
    pairs.rewards = torch.tensor([[2.0, 0.0]] * 3 + [[0.0, 1.0]])
    if source == "toy":
        pairs.gold[0] = torch.tensor([0.0, 1.0])
    for name, places in (("easy.pt", [0, 1, 2]), ("hard.pt", [3])):
        pairs.select(torch.tensor(places)).save(made_in(out), name)
    steps = [{"step": step, "score": 0.5 + step, "gold_reward": 1.0} for step in range(2)]
    (out / "ppo.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    monkeypatch.setattr(Figure, "savefig", lambda *given, **how: drawn.append(given[0]) or kept(*given, **how))
    run_main(monkeypatch, "--out", out, "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", 4, "--figure")
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    gaps, calibrated, frontier, course = drawn[0].axes
    labels = [text.get_text() for text in gaps.get_legend().get_texts()]
    assert set(labels) == {"γ = 2.00", *(["label right: 3", "label wrong: 1"] if source == "toy" else ["pairs: 4"])}
    assert sorted(text.get_text() for text in frontier.texts) == ["MPO", "SFT"]
    assert [list(line.get_ydata()) for line in course.lines] == [[0.5, 1.5], [1.0, 1.0]] and course.get_visible()
    assert len(calibrated.containers) >= 1
