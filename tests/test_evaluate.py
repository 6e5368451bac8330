"""Chapter 6: the answers' measures, means and intervals, tables, talk, the judge, the picture and evaluation.json."""

import io
import json
import math
import re
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TINY, make_pairs, plain_logprobs, plain_score, write

import evaluate
from evaluate import Settings, answer, ask, differences, judge, mean_and_error, summarise, t_interval, table, tally
from model import GPT, UserError, generate, mixed_seed, train_tokenizer
from reward import RewardModel, wilson_interval

LETTERS = train_tokenizer([], 257)  # the bytes and the end token
END = LETTERS.end
ENDS = ("", "_se", "_low", "_high")
ASKED = ("How do I paint my old chair?", "I want to sell my red lamp.", "Move it.", "Clean the big drum?")
QUESTIONS = [f"\n\nHuman: {question}\n\nAssistant:" for question in ASKED]
PROMPTS = [torch.tensor(LETTERS.encode(question)) for question in QUESTIONS]
CHOSEN = "Good luck with it!"
SETTINGS = Settings(max_new_tokens=10, temperature=0.7, seed=3)


def make_model(seed):
    torch.manual_seed(seed)
    return GPT(replace(TINY, vocabulary=LETTERS.size)).requires_grad_(False)


SFT, OTHER, SCORER = make_model(0), make_model(1), RewardModel(make_model(2)).requires_grad_(False)


def four_pairs(source="toy", repeat=1):
    responses = [torch.tensor([*LETTERS.encode(text), END]) for text in (f" {CHOSEN}", " No.")]
    gold = torch.tensor([[0.5, -0.25]] * 4 * repeat) if source == "toy" else None
    return make_pairs([(prompt, *responses) for prompt in PROMPTS for _ in range(repeat)], LETTERS, source, gold)


@pytest.fixture
def out(tmp_path):
    """A folder with SFT, a policy and a reward model."""
    write(tmp_path, LETTERS, sft=SFT, ppo=OTHER, reward=SCORER)
    return tmp_path


def test_kl_is_the_sum_of_log_ratios_at_temperature_1():
    """Though the answers are sampled at 0.7. The same seed samples the same answers here. SFT has none from itself."""
    responses = generate(OTHER, PROMPTS, END, 10, 0.7, mixed_seed(3, 500_000))
    expected = [(plain_logprobs(OTHER, *both) - plain_logprobs(SFT, *both)).sum().item()
                for both in zip(PROMPTS, responses, strict=True)]
    texts, columns = answer(SETTINGS, four_pairs(), OTHER, SFT, SCORER)
    assert min(map(abs, expected)) > 0.1 and columns["kl"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert texts == [LETTERS.decode(response).strip() for response in responses]
    assert answer(SETTINGS, four_pairs(), SFT, SFT, SCORER)[1]["kl"].tolist() == [0.0] * 4


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_answers_hold_text_gold_reward_length_and_end_of_each_prompt(monkeypatch, source):
    """Fixed answers, in another order of length than packing's: one helpful, one cut off, one empty, one polite."""
    texts = [" Sand the chair first.", " What a", "", " Great question!"]
    responses = [torch.tensor(LETTERS.encode(text) + [END] * (text != " What a")) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda *_: responses)
    given, columns = answer(SETTINGS, four_pairs(source), SFT, SFT, SCORER)
    rewards = [plain_score(SCORER, *both).item() for both in zip(PROMPTS, responses, strict=True)]
    expected = {"length": [23, 7, 1, 17], "ended": [1, 0, 1, 1], "reward": rewards, "kl": [0] * 4,
                "gold_reward": [1.0, -0.25, 0.0, 0.5] if source == "toy" else []}
    assert given == [text.strip() for text in texts]
    for name, column in columns.items():
        assert column.tolist() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    monkeypatch.setattr(SCORER, "score", lambda batch: torch.full((len(batch.last),), math.inf))
    with pytest.raises(UserError, match="finite"):
        answer(SETTINGS, four_pairs(), SFT, SFT, SCORER)


# ---- Statistics and tables ----


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (511, 1.965)])
def test_intervals_are_students(freedom, t):
    """The 97.5th percentile of a table of t, in units of the standard error, around a mean of 10."""
    values = 10 + torch.arange(freedom + 1.0).double() - freedom / 2
    mean, error = mean_and_error(values)
    low, high = t_interval(values)
    assert [mean, (high - 10) / error, (10 - low) / error] == pytest.approx([10, t, t], abs=6e-4)
    assert t_interval(torch.ones(freedom + 1)) == (1.0, 1.0) and t_interval(torch.ones(1)) == (None, None)


def test_summary_and_table_by_hand():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error √(14/3 / 4) = √(7/6). Means take Student's
    interval, 12.706 times the error of two values; shares take Wilson's; one value has no error, nothing is null."""
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == (3.0, pytest.approx(math.sqrt(7 / 6)))
    columns = {"reward": [0.0, 4.0], "win_rate_vs_sft": [0.5, 1.0], "gold_reward": [], "kl": [3.0], "ended": [0.0]}
    summary = summarise({name: torch.tensor(values) for name, values in columns.items()})
    assert list(summary) == [f"{key}{end}" for key in columns for end in ENDS]
    values = list(summary.values())
    expected = [2.0, 2.0, 2 - 2 * 12.7062, 2 + 2 * 12.7062, 0.75, 0.25, *wilson_interval(0.75, 2)]
    assert values[:8] == pytest.approx(expected, rel=1e-5) and values[8:16] == [None] * 4 + [3.0, None, None, None]
    lines = table({"ppo": summary, "mine": summary}, list(columns)).split("\n")
    row = ["2.00 ± 2.00", "75% (20% to 97%)", "–", "3.0 ± –", "0% (0% to 79%)"]
    header = ["policy", "reward", "win rate vs SFT", "gold reward", "kl", "ended"]
    assert [re.split("  +", line) for line in lines] == [header, ["MPO", *row], ["mine", *row]]


def test_differences_are_paired():
    """MPO − other: 1, 3: 2 ± 1, twice won; its own row is missing. The unpaired error would be 5 and more."""
    values = {"sft": torch.tensor([0.0, 10.0]), "ppo": torch.tensor([1.0, 13.0])}
    lines = [re.split("  +", line) for line in differences(values, "ppo", "prompts").split("\n")]
    assert lines == [["MPO against", "lead", "prompts won"],
                     ["SFT", "+2.00 ± 1.00 (-10.71 to +14.71)", "100% (34% to 100%)"]]


def test_side_by_side_shows_every_policy_on_the_first_prompts_even_an_empty_answer(capsys):
    texts = {"sft": ["Sand it.", "Sell it.", "", ""], "mine": ["", "No.", "", ""]}
    values = {"sft": torch.tensor([1.0, 3.0, 0, 0]), "mine": torch.tensor([-0.5, 0.0, 0, 0])}
    evaluate.side_by_side(four_pairs(), texts, values, 2)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n") if line not in ("", "Assistant:")]
    assert lines == ["Human: How do I paint my old chair?", "SFT [+1.00] Sand it.", "mine [-0.50] (nothing)",
                     "Human: I want to sell my red lamp.", "SFT [+3.00] Sell it.", "mine [+0.00] No."]


# ---- The command ----


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_wins_by_hand_are_saved_before_they_are_shown(run, monkeypatch, out, source):
    """Against chosen ½: win, win, loss, tie; against SFT's 0: win, win, loss, win; by length: 7 tokens are below 0.8
    times SFT's 10, 8 and 12 are not, 12.5 are 1.25 times."""
    write(out, test=four_pairs(source))
    judged, other = ("gold_reward", "reward") if source == "toy" else ("reward", "gold_reward")

    def fake(settings, pairs, policy, sft, *_):
        assert settings.max_new_tokens == 96  # the default of a model that was trained here
        own, length = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([7.0, 8.0, 12.0, 12.5])
        own, length = (own, length) if policy is not sft else (own * 0, torch.full((4,), 10.0))
        return [""] * 4, {judged: own, other: -own[: 4 * (source == "toy")], "length": length, "kl": own, "ended": own}

    monkeypatch.setattr(evaluate, "answer", fake)
    monkeypatch.setattr(evaluate, "score_pairs", lambda *_: torch.tensor([[0.5, 9.0]] * 4))
    monkeypatch.setattr(evaluate, "table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(evaluate, "--policies ppo.pt --save mine.json")
    row = json.loads((out / "mine.json").read_text())["ppo"]
    assert (row["win_rate_vs_chosen"], row["win_rate_vs_sft"]) == (0.625, 0.75)
    assert [row[f"win_rate_vs_sft_{part}"] for part in ("shorter", "as_long", "longer")] == [1.0, 0.5, 1.0]


def test_export_goes_to_the_exporter(run, monkeypatch, out, capsys):
    monkeypatch.setattr(evaluate, "export_model", print)
    run(evaluate, "--export ppo.pt folder")
    assert capsys.readouterr().out == f"{out / 'ppo.pt'} folder\n"


def test_prompt_prints_every_policys_answer(run, out, capsys):
    flags = "--policies sft.pt ppo.pt --max-new-tokens 12 --temperature 0 --prompt"
    run(evaluate, flags, ASKED[0])
    printed = capsys.readouterr().out
    for name, policy in (("SFT", SFT), ("MPO", OTHER)):
        expected = LETTERS.decode(generate(policy, PROMPTS[:1], END, 12, 0.0)[0]).rstrip("\ufffd")
        assert f"{name:12s} {expected}\n" in printed
    run(evaluate, flags, QUESTIONS[0])  # a prompt as in the data is one
    assert capsys.readouterr().out == printed
    with pytest.raises(UserError, match="context"):
        run(evaluate, flags, "x" * 500)


def test_prompt_without_a_text_answers_each_line_as_it_comes_till_end_of_input(run, monkeypatch, out, capsys):
    """A character is shown once it has all its bytes. What is too long is said to be, and the next line answered."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED[0]}\n\n{'x' * 500}\n{ASKED[1]}\n"))
    asked, shown, answers = [], [], [[*LETTERS.encode("aé\N{OWL}b"), END], [END]]

    def fake(policy, prompts, end, count, temperature, seed, watch):
        if len(prompts[0]) > 200:
            raise UserError("too long")
        asked.append((prompts[0].tolist(), count, seed))
        for token in answers.pop(0):
            watch(torch.tensor([token]))
            shown.append(capsys.readouterr())

    monkeypatch.setattr(evaluate, "generate", fake)
    run(evaluate, "--seed 2 --prompt --model sft.pt")
    assert asked == [(PROMPTS[0].tolist(), 96, mixed_seed(2, 0)), (PROMPTS[1].tolist(), 96, mixed_seed(2, 2))]
    assert [one.out for one in shown] == ["a", "", "é", "", "", "", "\N{OWL}", "b", "", "\n"]
    assert capsys.readouterr().out == "(nothing)\n" and "too long" in shown[-1].err


# ---- The judge: one request, then all questions ----


class Handler(BaseHTTPRequestHandler):
    """Sends the server's next reply, and the last one for ever; instead of a number it waits and hangs up."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.requests.append((self.path, self.headers, json.loads(body)))
        reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        time.sleep(reply) if isinstance(reply, float) else self.wfile.write(f"HTTP/1.0 {reply}".encode())


FINE = '200 OK\n\n{"choices": [{"message": {"content": "Verdict: A"}}]}'


@pytest.fixture
def endpoint(monkeypatch):
    """A chat endpoint on loopback that misbehaves on command."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(evaluate, "JUDGE_BACKOFF", 0.001)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.replies, server.requests, server.block_on_close = [FINE], [], False
        server.settings = Settings(judge=f"http://127.0.0.1:{server.server_address[1]}/v1", judge_model="tester")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("text, verdict", [
    ("Verdict: A", "A"), ("It is kinder.\nVerdict: B", "B"), ("One.\n\n  Verdict: TIE \n\n", "TIE"),
    ("Verdict: A\nVerdict: B", "B"), ("**Verdict: A**", "A"), ("**Verdict:** B", "B"), ("Verdict: **TIE**.", "TIE"),
    ("verdict: tie.", "TIE"), ("VERDICT: b", "B"), ("", None), ("A", None), ("Verdict: C", None), ("Verdict:", None),
    ("Verdict: A or B", None), ("Verdict: A\nI hope this helps.", None), ("So my Verdict: A", None),
])
def test_a_verdict_is_the_last_line_in_the_form_asked_for(text, verdict):
    assert evaluate.parse_verdict(text) == verdict


def test_a_request_holds_the_question_and_the_key_goes_to_the_server_alone(endpoint, monkeypatch, tmp_path):
    """Not replaced by a .netrc, not sent on by a redirect, not in a message."""
    assert ask(endpoint.settings, "Who?") == "A"
    path, headers, body = endpoint.requests.pop()
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body.pop("messages") == [{"role": "user", "content": "Who?"}]
    assert body == {"model": "tester", "temperature": 0, "max_tokens": 1024}
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    endpoint.replies = [f"307 Temporary Redirect\nLocation: {endpoint.settings.judge}/there\n\nsk-very-secret"]
    with pytest.raises(UserError, match=r"307 Temporary Redirect: \(the key\)") as error:
        ask(endpoint.settings, "x")
    assert "secret" not in str(error.value)
    assert [headers["Authorization"] for _, headers, _ in endpoint.requests] == ["Bearer sk-very-secret"]


@pytest.mark.parametrize("failure, said", [
    ("429 Busy\nRetry-After: 0\n\nslow down", "429 Busy: slow down"), ("500 Oops\n\n", "500 Oops: "),
    ("408 Late\n\n", "408"), ("599 Late\n\n", "599"), (0.0, "ConnectionError"), (0.6, "timed out"),
])
def test_what_may_pass_is_asked_again_but_not_for_ever(endpoint, monkeypatch, failure, said):
    """Twice it fails, the third attempt is fine; and then never."""
    monkeypatch.setattr(evaluate, "JUDGE_TIMEOUT", 0.15 if said == "timed out" else 5.0)
    endpoint.replies = [failure, failure, FINE]
    assert ask(endpoint.settings, "x") == "A"
    monkeypatch.setattr(evaluate, "JUDGE_RETRIES", 1)
    endpoint.replies = [failure]
    with pytest.raises(UserError, match=said):
        ask(replace(endpoint.settings, judge=endpoint.settings.judge + "/chat/completions/"), "x")
    assert [path for path, *_ in endpoint.requests] == ["/v1/chat/completions"] * 5


def test_waits_double_and_the_server_may_ask_for_more(endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    monkeypatch.setattr(evaluate, "JUDGE_BACKOFF", 1.0)
    endpoint.replies = ["500 \n\n"] * 3 + ["429 \nRetry-After: 7\n\n", "429 \nRetry-After: 86400\n\n", FINE]
    assert ask(endpoint.settings, "x") == "A"
    assert waits == [2.0, 4.0, 7, 300]


@pytest.mark.parametrize("reply, said", [
    ("400 Bad Request\n\ntoo long", "400 Bad Request: too long"), ("401 Unauthorized\n\n", "401 Unauthorized"),
    ("200 OK\n\n<html>", "JSONDecodeError"), ("200 OK\n\n[1]", "TypeError"), ('200 OK\n\n{"choices": []}', "Index"),
])
def test_a_refusal_stops_at_once_with_what_the_server_said(endpoint, reply, said):
    endpoint.replies, url = [reply], endpoint.settings.judge
    with pytest.raises(UserError, match=f"--judge {url}/chat/completions: {said}.*check URL"):
        ask(endpoint.settings, "x")
    assert len(endpoint.requests) == 1
    endpoint.replies = [FINE.replace('"Verdict: A"', "null")]
    assert ask(endpoint.settings, "x") is None  # nothing said is no verdict
    for url in ("localhost/v1", "ftp://x/v1", "http://", "http://x:y/v1"):
        with pytest.raises(UserError, match=r"--judge .*check URL"):
            ask(replace(endpoint.settings, judge=url), "x")


MINE = ["This is longer than what was chosen.", "Short.", CHOSEN, "And this one is the longest of them all."]
SFTS = ["Short too.", "This is longer.", CHOSEN, "None."]


def longer(question):
    """A judge that takes the longer answer."""
    first, second = (len(re.search(rf"<{name}>\n(.*)\n</{name}>", question, re.DOTALL)[1]) for name in "AB")
    return "A" if first > second else "B" if first < second else "TIE"


@pytest.fixture
def asking(monkeypatch, tmp_path):
    """Settings, with which every question goes to `verdict` and is kept in `questions`."""
    settings = Settings(judge="http://x", judge_model="tester", out=str(tmp_path))
    settings.verdict, settings.questions = longer, []
    monkeypatch.setattr(evaluate, "ask", lambda _, text: settings.questions.append(text) or settings.verdict(text))
    return settings


def judged(settings, mine=MINE, **others):
    """Verdicts on SFT and one more policy: 18 questions on three prompts, and one where all gave the same answer."""
    return judge(settings, four_pairs("hh"), {"sft": SFTS, "mine": mine, **others}, SFTS)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]


def test_tally_by_hand():
    """Win in both orders, loss in both, both TIE, always the first place, a win and a TIE, and two without a verdict:
    1, 0, ½, ½, ½; of 7 places that won, 5 were the first."""
    columns = tally([("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A"), ("A", "TIE"), (None, "A"), (None, None)])
    assert {name: column.tolist() for name, column in columns.items()} == {
        "win_rate": [1, 0, 0.5, 0.5, 0.5], "ties": [0, 0, 1, 1, 1], "orders_disagree": [0, 0, 0, 1, 1],
        "first_place_wins": [1, 0, 0, 1, 1, 1, 1], "no_verdict": [0, 0, 0, 0, 0, 1, 1]}


def test_a_judge_of_length_gives_the_known_win_rates(asking):
    """Against chosen: longer, shorter, the same, longer; against SFT's: longer, shorter, the same, longer. The judge
    sees no policy's name, and two with the same answers are one question."""
    rows = judged(asking, secret=list(MINE))
    rates = {("sft", "chosen"): 0.125, ("mine", "chosen"): 0.625, ("mine", "sft"): 0.625, ("secret", "chosen"): 0.625,
             ("secret", "sft"): 0.625}
    assert {versus: row["win_rate"] for versus, row in rows.items()} == rates
    mine = [rows["mine", "sft"][key] for key in ("ties", "orders_disagree", "first_place_wins", "no_verdict")]
    assert mine == [0.25, 0, 0.5, 0] and len(asking.questions) == 19
    for text in asking.questions:
        assert "secret" not in text and text.index("Human: ") < text.index("<A>") < text.index("<B>")


def test_the_cost_is_said_first_and_every_verdict_kept_at_once_and_not_asked_for_again(asking, capsys, tmp_path):
    """Where half of the file's last line is lost, that question alone is asked again."""
    seen, path = [], tmp_path / "judge.jsonl"  # what was printed, and what the file held, at each question
    asking.verdict = lambda _: seen.append([capsys.readouterr().out, path.read_text()]) or time.sleep(0.002) or "A"
    asking.judge_parallel, asking.judge_price = 1, 2.5
    first, rows, tokens = judged(asking), rows_of(tmp_path), sum(map(len, asking.questions)) / 4
    cost = f"about {tokens:,.0f} input tokens (4 characters each), ${tokens * 2.5 / 1e6:.2f} without the replies"
    assert "is asked 19 of 19 questions" in seen[0][0] and cost in seen[0][0]
    assert [text.count("\n") for _, text in seen] == list(range(19)) and len(set(asking.questions)) == 19
    asking.judge_price = None
    assert judged(asking) == first and rows_of(tmp_path) == rows
    assert re.search("is asked 0 of 19 questions.* 0 input tokens.* price not known", capsys.readouterr().out)
    path.write_bytes(path.read_bytes()[:-20] + b"\n")
    for mine, model, questions in ((MINE, "tester", 1), (["New.", *MINE[1:]], "tester", 4), (MINE, "another", 19)):
        asking.questions.clear()
        asking.judge_model = model
        assert judged(asking, mine) == judged(asking, mine) == first
        assert len(asking.questions) == questions


def test_no_verdict_is_counted_not_asked_again_and_not_kept(asking, tmp_path):
    asking.verdict = lambda text: None if f"<B>\n{MINE[0]}" in text else longer(text)
    rows = judged(asking)
    assert len(asking.questions) == 19 and len(rows_of(tmp_path)) == 17
    for opponent in ("chosen", "sft"):  # shorter, the same, longer are left
        assert (rows["mine", opponent]["win_rate"], rows["mine", opponent]["no_verdict"]) == (0.5, 0.25)

@pytest.mark.parametrize("flags, said", [
    ({"judge": "http://x/v1"}, "--judge-model"), ({"judge_model": "m"}, "--judge URL"),
    ({"figure": True}, "pip install"), ({"judge": "http://x/v1", "judge_model": "m"}, "torchrun"),
])
def test_a_mistake_in_the_flags_is_said_at_once(flags, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(evaluate, "processes", lambda: (0, 2))
    with pytest.raises(UserError, match=said):
        Settings(**flags)


def test_command_with_a_judge_adds_its_numbers_and_goes_on_where_it_was_stopped(run, out, capsys, asking):
    write(out, test=four_pairs("hh", repeat=2))  # every prompt twice: answered once
    flags = "--policies sft.pt ppo.pt --max-new-tokens 8 --prompts 3 --judge x --judge-model m --judge-parallel 1"
    verdicts = ["TIE"] * 5
    asking.verdict = lambda _: verdicts.pop()
    with pytest.raises(IndexError):
        run(evaluate, flags)
    without = json.loads((out / "evaluation.json").read_text())  # the other numbers are not lost
    assert [without["sft"][key] for key in ("kl", "win_rate_vs_sft", "gold_reward")] == [0.0, 0.5, None]
    assert {f"{key}{end}" for key in evaluate.KEYS for end in ENDS} <= set(without["ppo"])
    shown = r"\A3 test prompts(.*\n)+SFT  .*%\)\n(.*\n)+.*paired by prompt\nMPO against .*\nSFT "  # the last one's lead
    printed = capsys.readouterr().out
    assert re.search(shown, printed) and printed.count(ASKED[0]) == 1
    asking.verdict, asking.questions[:] = lambda _: "TIE", []
    run(evaluate, flags)
    assert len(asking.questions) == 3 * 2 * 3 - 5  # the same answers, so what is known is known
    for name, summary in json.loads((out / "evaluation.json").read_text()).items():
        assert (summary["judge_vs_chosen"]["judge"], summary["judge_vs_chosen"]["win_rate"]) == ("m", 0.5)
        assert ("judge_vs_sft" in summary) == (name == "ppo")
    assert re.search(r"^MPO against sft +50% \(", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_figure(run, monkeypatch, out, source):
    """Three easy pairs of gap 2, one wrong by gold, and one hard of gap −1; a PPO log of two steps."""
    figures = pytest.importorskip("matplotlib.figure")
    pairs, kept, drawn = four_pairs(source), figures.Figure.savefig, []
    pairs.rewards = torch.tensor([[2.0, 0.0]] * 3 + [[0.0, 1.0]])
    if source == "toy":
        pairs.gold[0] = torch.tensor([0.0, 1.0])
    write(out, test=pairs, easy=pairs.select(torch.tensor([0, 1, 2])), hard=pairs.select(torch.tensor([3])))
    steps = [{"step": step, "score": 0.5 + step, "gold_reward": 1.0} for step in range(2)]
    (out / "ppo.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    monkeypatch.setattr(figures.Figure, "savefig", lambda *given, **how: drawn.append(given[0]) or kept(*given, **how))
    run(evaluate, "--policies sft.pt ppo.pt --max-new-tokens 4 --figure")
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    gaps, calibrated, frontier, course = drawn[0].axes
    groups = ["label right: 3", "label wrong: 1"] if source == "toy" else ["pairs: 4"]
    assert {text.get_text() for text in gaps.get_legend().get_texts()} == {"γ = 2.00", *groups}
    assert sorted(text.get_text() for text in frontier.texts if text.get_visible()) == ["MPO", "SFT"]
    assert [list(line.get_ydata()) for line in course.lines] == [[0.5, 1.5], [1.0, 1.0]] and course.get_visible()
    assert calibrated.containers
