"""Chapter 6: the answers' measures, means and intervals, wins, tables, talk, the judge and the picture."""

import io
import itertools
import json
import math
import re
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import END, LETTERS, make_pairs, plain_logprobs, plain_score, spell, tiny, write

import evaluate
from evaluate import POINTS, Refused, Settings, answer, ask, judge, length_controlled, summarise, table, tally
from model import UserError, ask_in_form, generate, mixed_seed, read_log
from reward import RewardModel, wilson_interval

ASKED = ("How do I paint my old chair?", "I want to sell my red lamp.", "Move it.", "Clean the big drum?")
QUESTIONS = [f"\n\nHuman: {question}\n\nAssistant:" for question in ASKED]
PROMPTS = [spell(f"{question}…") for question in QUESTIONS]
CHOSEN = "Good luck with it!"
SETTINGS = Settings(max_new_tokens=10, temperature=0.7, seed=3)
SFT, OTHER, trunk = map(tiny, range(3))
SCORER = RewardModel(trunk)
for one in (SFT, OTHER, SCORER):
    one.requires_grad_(False)


def four_pairs(source="toy", repeat=1):
    documents = [(prompt, spell(f" {CHOSEN}{'!' * n}"), spell(" No.")) for prompt in PROMPTS for n in range(repeat)]
    gold = torch.tensor([[0.5, -0.25]] * 4 * repeat) if source == "toy" else None
    return make_pairs(documents, gold)


@pytest.fixture
def out(tmp_path):
    """A folder with SFT, a policy and a reward model."""
    write(tmp_path, sft=SFT, ppo=OTHER, reward=SCORER, test=four_pairs())
    return tmp_path


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_answers_hold_text_gold_reward_length_and_end_of_each_prompt_and_kl_at_temperature_1(monkeypatch, source):
    """Of fixed answers, in another order of length than packing's: one helpful, one cut off, one empty, one polite."""
    texts, asked = [" Sand the chair first.", " What a…", "", " Great question!"], []
    responses = [spell(text) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda _, prompts, *how: asked.extend(how) or responses)
    given, columns = answer(SETTINGS, four_pairs(source), OTHER, SFT, SCORER)
    both = list(zip(PROMPTS, responses, strict=True))
    kl = [(plain_logprobs(OTHER, *one) - plain_logprobs(SFT, *one)).sum().item() for one in both]
    expected = {"length": [23, 7, 1, 17], "ended": [1, 0, 1, 1], "reward": [plain_score(SCORER, *one) for one in both],
                "kl": kl, "gold_reward": [1.0, -0.25, 0.0, 0.5] if source == "toy" else []}
    assert asked == [END, 10, 0.7, mixed_seed(3, 500_000)] and given == [text.strip(" …") for text in texts]
    for name, column in columns.items():
        assert column.tolist() == pytest.approx(torch.tensor(expected[name]).tolist(), rel=1e-4, abs=1e-4), name
    monkeypatch.setattr(SCORER, "score", lambda batch: torch.full((len(batch.last),), math.inf))
    with pytest.raises(UserError, match="finite"):
        answer(SETTINGS, four_pairs(), SFT, SFT, SCORER)


def test_summary_and_table_by_hand():
    """Means take Student's interval: t of a table, in units of the standard error; shares take Wilson's. The error of
    two values is half their difference; one value has none, and none is null."""
    for freedom, t in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042, 511: 1.965}.items():
        mean, error, low, high = summarise({"reward": 10 + torch.arange(freedom + 1.0) - freedom / 2}).values()
        assert [mean, (high - 10) / error, (10 - low) / error] == pytest.approx([10, t, t], abs=6e-4)
    columns = {"reward": [0.0, 4.0], "win_rate_vs_sft": [0.5, 1.0], "gold_reward": [], "kl": [3.0], "ended": [0.0],
               "lead_vs_last": [1.0, 3.0]}
    summary = summarise({name: torch.tensor(values) for name, values in columns.items()})
    assert list(summary) == [f"{key}{end}" for key in columns for end in ("", "_se", "_low", "_high")]
    values = list(summary.values())
    expected = [2.0, 2.0, 2 - 2 * 12.7062, 2 + 2 * 12.7062, 0.75, 0.25, *wilson_interval(0.75, 2)]
    assert values[:8] == pytest.approx(expected, rel=1e-5) and values[8:16] == [None] * 4 + [3.0, None, None, None]
    lines = table({"ppo": summary, "mine": summary}, list(columns)).split("\n")
    row = "  2.00 ± 2.00  75% (20% to 97%)  –  3.0 ± –  0% (0% to 79%)  +2.00 (-10.71 to +14.71)"
    header = "policy  reward  win rate vs SFT  gold reward  kl  ended  lead vs last"
    assert [re.sub("  +", "  ", line) for line in lines] == [header, f"MPO{row}", f"mine{row}"]


@pytest.mark.parametrize("groups, plain, controlled", [
    ({10: "WWWWWWWW==", -10: "WWWW==LLLL"}, 0.7, 0.75),  # odds of 9 and of 1: √9 = 3 halfway
    ({0: "WWWW====LL", 20: "WWWWWWWWWL"}, 0.75, 0.6),  # what counts is length 0, not the mean length
    ({5: "WWWWL" * 6, -5: "WLLLL" * 2}, 0.65, 0.5),  # length alone
    ({5: "WWWWWWWLLL" * 3, -5: "WWWWWWWLLL"}, 0.7, 0.7),  # not length
    ({5: "W" * 30, -5: "W" * 10}, 1, 1), ({1: "WWW", -1: "LLL", 100: "W"}, 4 / 7, 0.5),  # needs a ridge
    ({0: "WLLL"}, 0.25, 0.25), ({}, None, None),  # nothing to control for
    ({7: "WLLL"}, 0.25, None), ({500: "WWW", 505: "L"}, 0.75, None), ({-3: "W"}, 1, None),  # none as long, or shorter
])
@pytest.mark.filterwarnings("error")  # of one value torch knows no deviation, and says so
def test_length_controlled_win_rate_by_hand(groups, plain, controlled):
    """groups: by how much longer → wins, ties and losses. With two lengths the regression fits both groups' shares."""
    longer = torch.tensor([float(by) for by, letters in groups.items() for _ in letters])
    won = torch.tensor(["L=W".index(letter) / 2 for letter in "".join(groups.values())])
    summary = summarise({"win_rate": won, "length_controlled": length_controlled(won, longer)})
    assert (summary["win_rate"], summary["length_controlled"]) == pytest.approx((plain, controlled), abs=1e-3)


def test_length_controlled_win_rate_is_the_likeliest_and_its_error_a_jackknifes():
    """The likeliest weights on ever finer grids, with ties and a few very long answers."""
    generator = torch.Generator().manual_seed(0)
    longer = 20 * torch.randn(60, generator=generator) ** 3 + 15
    won = ((longer / longer.std()).tanh() + torch.randn(60, generator=generator) + 0.3).sign() / 2 + 0.5
    won[::7] = 0.5
    best, width = torch.zeros(2), 4.0  # a, b
    for _ in range(15):
        grid = torch.cartesian_prod(*[torch.linspace(-width, width, 21)] * 2) + best  # [441, 2]
        logits = grid[:, :1] + grid[:, 1:] * (longer / longer.std()).tanh()  # [441, 60]
        loss = F.binary_cross_entropy_with_logits(logits, won.expand_as(logits), reduction="none").sum(1)
        best, width = grid[loss.argmin()], width / 2
    columns = {"length_controlled": length_controlled(won, longer)}
    assert summarise(columns)["length_controlled"] == pytest.approx(best[0].sigmoid().item(), abs=2e-4)
    others = [torch.arange(60) != left for left in range(60)]
    rates = torch.stack([length_controlled(won[kept], longer[kept]).mean() for kept in others])
    jackknife = (59 / 60 * (rates - rates.mean()).square().sum()).sqrt().item()
    assert summarise(columns)["length_controlled_se"] == pytest.approx(jackknife, rel=0.1)


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_wins_by_hand_are_saved_before_they_are_shown_then_answers_side_by_side(run, monkeypatch, out, capsys, source):
    """MPO against chosen ½: win, win, loss, tie; against SFT's 0: win, win, loss, win. Mine leads by 1, −2, −1, ½."""
    write(out, test=four_pairs(source, repeat=2), mine=OTHER)  # of a prompt's two pairs the first one counts
    judged, other = ("gold_reward", "reward") if source == "toy" else ("reward", "gold_reward")
    points = {"mine": [3.0, -1.0, -2.0, 1.0], "ppo": [2.0, 1.0, -1.0, 0.5], "sft": [0.0] * 4}
    lengths = {"mine": [9.0] * 4, "ppo": [7.0, 8.0, 22.0, 32.5], "sft": [10.0] * 4}
    names = itertools.cycle(points)

    def fake(settings, *_):
        assert settings.max_new_tokens == 96  # the default of a model that was trained here
        name = next(names)
        own, length = torch.tensor(points[name]), torch.tensor(lengths[name])
        columns = {judged: own, other: -own[: 4 * (source == "toy")], "length": length, "kl": own, "ended": own}
        return [f"It is {name}.", "", "", ""], columns

    monkeypatch.setattr(evaluate, "answer", fake)
    monkeypatch.setattr(evaluate, "score_pairs", lambda *_: torch.tensor([[0.5, 9.0]] * 4))
    monkeypatch.setattr(evaluate, "table", lambda *_: f"saved: {(out / 'mine.json').exists()}")
    run(evaluate, "--policies mine.pt ppo.pt --samples 2 --save mine.json")
    rows = json.loads((out / "mine.json").read_text())
    assert (rows["ppo"]["win_rate_vs_chosen"], rows["ppo"]["win_rate_vs_sft"]) == (0.625, 0.75)
    assert (rows["mine"]["lead_vs_last"], rows["mine"]["win_rate_vs_last"]) == (-0.375, 0.5)
    assert rows["mine"]["lead_vs_last_se"] == pytest.approx(0.6884, abs=1e-4)  # paired: √(5.6875 / 3 / 4)
    for opponent, won, length in (("sft", [1.0, 1.0, 0.0, 1.0], 10), ("chosen", [1.0, 1.0, 0.0, 0.5], len(CHOSEN) + 2)):
        expected = length_controlled(torch.tensor(won), torch.tensor(lengths["ppo"]) - length).mean().item()
        assert rows["ppo"][f"length_controlled_vs_{opponent}"] == pytest.approx(expected) != sum(won) / 4
    *tables, shown = capsys.readouterr().out.split("\n\n", 2)
    assert all("saved: True" in one for one in tables)
    first, second = "mine [+3.00] It is mine. MPO [+2.00] It is ppo.", "mine [-1.00] (nothing) MPO [+1.00] (nothing)"
    questions = [" ".join(question.split()) for question in QUESTIONS]
    assert " ".join(shown.split()) == f"{questions[0]} {first} {questions[1]} {second} wrote {out}/mine.json"


def test_prompt_prints_every_policys_answer(run, out, capsys):
    flags = "--policies sft.pt ppo.pt --max-new-tokens 12 --temperature 0 --prompt"
    run(evaluate, flags, ASKED[0])
    printed = capsys.readouterr().out
    for name, policy in (("SFT", SFT), ("MPO", OTHER)):
        expected = LETTERS.decode(generate(policy, PROMPTS[:1], END, 12, 0.0)[0]).strip()
        assert f"{name:12s} {expected}\n" in printed and expected
    for form, question in (("plain", QUESTIONS[0]), ("dialogue", QUESTIONS[0]), ("tldr", ASKED[0])):
        write(out, test=replace(four_pairs(), form=form))
        run(evaluate, flags, question)  # a prompt as in the data is one
        assert (capsys.readouterr().out == printed) == (form != "tldr")
    plain, tldr = (ask_in_form(LETTERS, form, "{}") for form in ("plain", "tldr"))
    assert LETTERS.decode(plain) == "{}" and LETTERS.decode(tldr) == "POST: {}\n\nTL;DR:"
    with pytest.raises(UserError, match="context"):
        run(evaluate, flags, "x" * 500)


def test_prompt_without_a_text_answers_each_line_as_it_comes_till_end_of_input(run, monkeypatch, out, capsys):
    """What is too long is said to be. Nothing is written."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED[0]}\n\n{'x' * 500}\n{ASKED[1]}\n"))
    asked, shown, answers = [], [], [spell(" aé\N{OWL}b"), torch.tensor([END])]

    def fake(policy, prompts, end, count, temperature, seed):
        shown.append(capsys.readouterr())
        if len(prompts[0]) > 200:
            raise UserError("too long")
        assert torch.equal(policy.embedding.weight, SFT.embedding.weight) and (end, temperature) == (END, 0.5)
        asked.append((prompts[0].tolist(), count, seed))
        return [answers.pop(0)]

    monkeypatch.setattr(evaluate, "generate", fake)
    before = {path: path.read_bytes() for path in out.iterdir()}
    run(evaluate, "--seed 2 --temperature 0.5 --prompt --policies ppo.pt sft.pt")
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert asked == [(PROMPTS[0].tolist(), 96, mixed_seed(2, 0)), (PROMPTS[1].tolist(), 96, mixed_seed(2, 2))]
    assert [one.out for one in shown] == ["", "aé\N{OWL}b\n", ""] and "too long" in shown[2].err
    assert capsys.readouterr().out == "(nothing)\n"


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
    ("Verdict: A or B", None), ("Verdict: A\nI hope this helps.", None), ("So my Verdict: A", None), (None, None),
    ("**Verdict**: A", "A"), ("### Verdict: B", "B"), ('Verdict: "A"', "A"), ("> Verdict: [TIE].", "TIE"),
])
def test_a_verdict_is_the_last_line_in_the_form_asked_for(endpoint, text, verdict):
    endpoint.replies = ["200 OK\n\n" + json.dumps({"choices": [{"message": {"content": text}}]})]
    assert ask(endpoint.settings, "Who?") == verdict


def test_a_request_holds_the_question_and_the_key_goes_to_the_server_alone(endpoint, monkeypatch, tmp_path):
    """Not replaced by a .netrc, not sent on by a redirect, not in a message."""
    assert ask(endpoint.settings, "?") == "A"
    path, headers, body = endpoint.requests.pop()
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    asked = [{"role": "user", "content": "?"}]
    assert body == {"model": "tester", "temperature": 0, "max_tokens": 1024, "messages": asked}
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    endpoint.replies = [f"307 Temporary Redirect\nLocation: {endpoint.settings.judge}/there\n\nsk-very-secret"]
    with pytest.raises(UserError, match=r"307 Temporary Redirect: \(the key\)") as error:
        ask(endpoint.settings, "x")
    assert "secret" not in str(error.value)
    assert [headers["Authorization"] for _, headers, _ in endpoint.requests] == ["Bearer sk-very-secret"]


@pytest.mark.parametrize("failure, said, attempts", [
    ("429 Busy\nRetry-After: 0\n\nslow down", "429 Busy: slow down", 2), ("500 Oops\n\n", "500 Oops: ", 2),
    ("408 Late\n\n", "408", 2), ("599 Late\n\n", "599", 2), (0.0, "ConnectionError", 2), (0.6, "timed out", 2),
    ("400 Bad Request\n\ntoo long", "400 Bad Request: too long", 1), ("401 Unauthorized\n\n", "401 Unauthorized", 1),
    ("200 OK\n\n<html>", "JSONDecodeError", 1), ("200 OK\n\n[1]", "TypeError", 1),
    ('200 OK\n\n{"choices": []}', "Index", 1)])
def test_what_may_pass_is_asked_again_but_not_for_ever_a_refusal_never(endpoint, monkeypatch, failure, said, attempts):
    """It says what the server said. When it fails twice, the third attempt is fine."""
    monkeypatch.setattr(evaluate, "JUDGE_TIMEOUT", 0.15 if said == "timed out" else 5.0)
    if attempts == 2:
        endpoint.replies = [failure, failure, FINE]
        assert ask(endpoint.settings, "x") == "A" and len(endpoint.requests) == 3
    monkeypatch.setattr(evaluate, "JUDGE_RETRIES", 1)
    endpoint.replies, endpoint.requests, url = [failure], [], f"{endpoint.settings.judge}/chat/completions"
    with pytest.raises(UserError, match=f"--judge {url}: .*{said}.*check URL") as error:
        ask(replace(endpoint.settings, judge=f"{url}/"), "x")
    assert isinstance(error.value, Refused) == str(failure).startswith("400")
    assert [path for path, *_ in endpoint.requests] == ["/v1/chat/completions"] * attempts


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
    """Verdicts on SFT and one more policy: 18 questions; none on the third prompt: all gave the same answer."""
    answers = {name: (texts, {"length": torch.tensor([float(len(text)) for text in texts])})
               for name, texts in {"sft": SFTS, "mine": mine, **others}.items()}
    opponents = {"chosen": ([CHOSEN] * 4, {"length": torch.full((4,), len(CHOSEN))}), "sft": answers["sft"]}
    summaries = {name: {} for name in answers}
    judge(settings, [question.strip() for question in QUESTIONS], answers, opponents, summaries)
    found = {f"{name[9:]} of {of}": row for of, rows in summaries.items() for name, row in rows.items()}
    assert {row.pop("judge") for row in found.values()} == {settings.judge_model}
    return found


def test_tally_by_hand():
    """Win in both orders, loss in both, both TIE, always the first place, a win and a TIE, and two without a verdict:
    1, 0, ½, ½, ½; the first place got ½ of a prompt but where it always won. Where it won it was the shorter one."""
    verdicts = [("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A"), ("A", "TIE"), (None, "A"), (None, None)]
    points = torch.tensor([[POINTS[verdict] for verdict in both] for both in verdicts]).T
    longer = torch.tensor([-1.0, 1, 2, 3, 4, 5, 6])
    columns = {name: column.tolist() for name, column in tally(points, longer).items()}
    won = torch.tensor([1, 0, 0.5, 0.5, 0.5])
    assert columns.pop("length_controlled") == length_controlled(won, longer[:5]).tolist()
    assert columns == {"win_rate": won.tolist(), "ties": [0, 0, 1, 1, 1], "orders_disagree": [0, 0, 0, 1, 1],
                       "first_place_wins": [0.5, 0.5, 0.5, 1, 0.75], "no_verdict": [0, 0, 0, 0, 0, 1, 1]}


def test_a_judge_of_length_gives_the_known_win_rates(asking, tmp_path):
    """Against either: longer, shorter, the same, longer. The judge sees no policy's name, and two with the same answers
    are one question. No verdict is counted, not asked for again, and not kept: shorter, the same, longer are left."""
    rows = judged(asking, secret=list(MINE))
    expected = dict.fromkeys(("chosen of mine", "sft of mine", "chosen of secret", "sft of secret"), 0.625)
    assert {versus: row["win_rate"] for versus, row in rows.items()} == {"chosen of sft": 0.125, **expected}
    gaps = torch.tensor([float(len(ours) - len(theirs)) for ours, theirs in zip(MINE, SFTS, strict=True)])
    controlled = length_controlled(torch.tensor([1, 0, 0.5, 1]), gaps).mean().item()
    assert rows["sft of mine"]["length_controlled"] == pytest.approx(controlled)
    assert len(asking.questions) == 18
    for text in asking.questions:
        assert "secret" not in text and text.index("Human: ") < text.index("<A>") < text.index("<B>")
    for name, mute in (("mute", lambda: None), ("filtered", Mock(side_effect=Refused("too long")))):
        asking.verdict = lambda text, mute=mute: mute() if f"<B>\n{MINE[0]}" in text else longer(text)
        asking.judge_model, asking.questions[:] = name, []
        rows, kept = judged(asking), (tmp_path / "verdicts.jsonl").read_text().count(f'"{name}"')
        assert (len(asking.questions), kept) == (18, 16)
        for versus in ("chosen of mine", "sft of mine"):
            assert (rows[versus]["win_rate"], rows[versus]["no_verdict"]) == (0.5, 0.25)
    asking.judge_model, asking.verdict, asking.judge_parallel = "strict", Mock(side_effect=Refused("no parameter")), 1
    with pytest.raises(Refused, match="no parameter"):
        judged(asking)
    asking.verdict = Mock(side_effect=[Refused("a filter")] * 17 + ["A"])
    assert {row["no_verdict"] for row in judged(asking).values()} == {0.75}  # all but the last were refused


def test_the_cost_is_said_first_and_every_verdict_kept_at_once_and_not_asked_for_again(asking, capsys, tmp_path):
    """Where half of the file's last line is lost, that question alone is asked again."""
    seen, path = [], tmp_path / "verdicts.jsonl"  # what was printed, and what the file held, at each question
    asking.verdict = lambda _: seen.append([capsys.readouterr().out, path.read_text()]) or time.sleep(0.002) or "A"
    asking.judge_parallel = 1
    first, kept, tokens = judged(asking), path.read_bytes(), sum(map(len, asking.questions)) / 4
    cost = f"about {tokens:,.0f} input tokens (4 characters each)"
    assert "is asked 18 of 18 questions" in seen[0][0] and cost in seen[0][0]
    assert [text.count("\n") for _, text in seen] == list(range(18)) and len(set(asking.questions)) == 18
    assert judged(asking) == first and path.read_bytes() == kept + b"\n"
    assert re.search("is asked 0 of 18 questions.* 0 input tokens", capsys.readouterr().out)
    path.write_bytes(kept[:-20])
    for mine, model, questions in ((MINE, "tester", 1), (["New.", *MINE[1:]], "tester", 4), (MINE, "another", 18)):
        asking.questions.clear()
        asking.judge_model = model
        assert judged(asking, mine) == judged(asking, mine) == first and len(asking.questions) == questions


def test_two_judges_at_once_lose_no_verdict(asking):
    def verdict(question):
        if len(asking.questions) == 5:
            judged(replace(asking, judge_model="other"))
        return longer(question)

    asking.verdict, asking.judge_parallel = verdict, 1
    judged(asking)
    models = [row["model"] for row in read_log(Path(asking.out) / "verdicts.jsonl")]
    assert sorted(models) == ["other"] * 18 + ["tester"] * 18


def test_a_judge_or_a_talk_under_torchrun_and_a_picture_without_matplotlib_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(evaluate, "processes", lambda: (0, 2))
    for flags in ({"figure": True}, {"judge": "x", "judge_model": "m"}, {"prompt": ""}):
        with pytest.raises(UserError, match="pip install" if "figure" in flags else "torchrun"):
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
    assert without["ppo"]["kl"] != 0.0
    shown = r"\A3 test prompts(.*\n)+SFT  .*%\)\n(.*\n)+\nwins by reward;.*\npolicy .* lead vs last\nSFT "
    printed = capsys.readouterr().out
    assert re.search(shown, printed) and printed.count(ASKED[0]) == 1
    asking.verdict, asking.questions[:] = lambda _: "TIE", []
    run(evaluate, flags)
    assert len(asking.questions) == 3 * 2 * 3 - 5  # the same answers, so what is known is known
    assert sum(f"\n{CHOSEN}\n" in text for text in asking.questions) > 4
    for name, summary in json.loads((out / "evaluation.json").read_text()).items():
        assert (summary["judge_vs_chosen"]["judge"], summary["judge_vs_chosen"]["win_rate"]) == ("m", 0.5)
        assert ("judge_vs_sft" in summary) == (name == "ppo")
    assert re.search(r"^MPO against sft +50% \(", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_figure(run, monkeypatch, out, source):
    """Three easy pairs of gaps 2 and 3, one wrong by gold, and one hard of gap −1; a PPO log of two steps."""
    figures = pytest.importorskip("matplotlib.figure")
    pairs, kept, drawn = four_pairs(source), figures.Figure.savefig, []
    pairs.rewards = torch.tensor([[2.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
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
    assert {text.get_text() for text in gaps.get_legend().get_texts()} == {"easy from 2.00", *groups}
    assert sorted(text.get_text() for text in frontier.texts if text.get_visible()) == ["MPO", "SFT"]
    assert [list(line.get_ydata()) for line in course.lines] == [[0.5, 1.5], [1.0, 1.0]] and course.get_visible()
    assert calibrated.containers
