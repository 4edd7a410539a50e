"""Pairwise judges: from who beats whom to the rewards of a group, and the judge behind HTTP against a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.api.inputs import JudgeSpec, RewardSpec
from otj_runtime.pod.errors import RewardFailed, RewardImportFailed
from otj_runtime.rewards import RewardTable, build_rewards, http_judge, load_rewards
from otj_runtime.rewards.http_judge import HttpJudge, parse_verdict, pause_s, retry_after_s
from otj_runtime.rewards.judge import JudgeReward, round_robin, win_shares

Answer = Callable[[dict[str, Any]], Awaitable[web.Response] | web.Response]


def longest(prompts: list[Any], pairs: list[list[str]]) -> list[int]:
    return [int(len(b) > len(a)) if len(a) != len(b) else -1 for a, b in pairs]


def judged(judge: Any, texts: list[str], *, groups: list[int] | None = None, prompt: Any = "p") -> RewardTable:
    ids = [[0]] * len(texts)
    groups = groups or [0] * len(texts)
    return build_rewards(judge=judge).score(
        prompts=[prompt] * len(texts), completions=texts, completion_ids=ids, columns={}, group_ids=groups
    )


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), both_orders=st.booleans(), data=st.data())
def test_wins_of_a_group_share_out_all_its_comparisons(sizes: list[int], both_orders: bool, data: st.DataObject) -> None:
    groups = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
    matches = round_robin(groups, both_orders=both_orders)
    assert len(matches) == sum(size * (size - 1) // 2 for size in sizes) * (1 + both_orders)
    winners = data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=len(matches), max_size=len(matches)))
    shares = win_shares(sum(sizes), matches, winners)
    assert all(0 <= share <= 1 for share in shares)
    for group in groups:
        assert sum(shares[i] for i in group) == pytest.approx(len(group) / 2)


def test_the_best_of_a_group_wins_every_comparison_and_groups_do_not_meet() -> None:
    table = judged(longest, ["a", "aaa", "aa", "long enough to beat all", "x"], groups=[0, 0, 0, 1, 1])
    assert table.totals == [0.0, 1.0, 0.5, 1.0, 0.0]


def test_both_orders_cancel_a_liking_for_a_position() -> None:
    assert judged(lambda prompts, pairs: [0] * len(pairs), ["x", "y", "z"]).totals == [0.5, 0.5, 0.5]


def test_one_order_asks_half_as_much() -> None:
    asked: list[list[str]] = []
    reward = JudgeReward(lambda prompts, pairs: asked.extend(pairs) or [0] * len(pairs), both_orders=False)
    asyncio.run(reward(prompts=["p"] * 3, completions=["x", "y", "z"], group_ids=[0, 0, 0], log_metric=lambda *_: None))
    assert asked == [["x", "y"], ["x", "z"], ["y", "z"]]


def test_equal_completions_draw_without_a_question() -> None:
    def never(prompts: list[Any], pairs: list[Any]) -> list[int]:
        raise AssertionError("asked")

    assert judged(never, ["same", "same"]).totals == [0.5, 0.5]


def test_an_object_with_trls_method_judges_and_what_it_cannot_decide_is_a_draw_that_is_counted() -> None:
    class Undecided:
        def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
            return [-1] * len(completions)

    table = judged(Undecided(), ["a", "b"])
    assert (table.totals, table.metrics) == ([0.5, 0.5], {"judge/undecided": 1.0})


@pytest.mark.parametrize(
    ("answer", "words"),
    [([0], r"1 answers for 2 pairs"), (None, "no list"), ([0, 2], "answered 2 on pair 1"), (["A", "B"], "answered 'A' on pair 0")],
)
def test_what_is_no_answer_is_refused_with_the_pair(answer: Any, words: str) -> None:
    with pytest.raises(RewardFailed, match=words):
        judged(lambda prompts, pairs: answer, ["one", "two"])


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", 0),
        (" **B**.\n", 1),
        ("tie", -1),
        ("<think>A? No.</think>\nB", 1),
        ("At first [[B]], but then [[A]]", 0),
        ("A is better than B", None),
        ("", None),
        ("both", None),
    ],
)
def test_a_verdict_is_read_or_not(answer: str, verdict: int | None) -> None:
    assert parse_verdict(answer) == verdict


def test_the_pause_grows_is_bounded_and_follows_the_server() -> None:
    assert 0.25 <= pause_s(0, None) <= 0.5
    assert pause_s(30, None) <= 60
    assert (pause_s(0, 7.0), pause_s(0, 9999.0), pause_s(3, -5.0)) == (7.0, 60.0, 0.0)
    assert retry_after_s("3") == 3.0
    assert retry_after_s(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert (retry_after_s("soon"), retry_after_s(None)) == (None, None)


class Service:
    """A chat service on this machine. `answers` decides on each request by its number; what was asked is kept."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.under_way = self.most_under_way = 0
        self.answer: Callable[[int, dict[str, Any]], Any] = lambda number, body: "A"
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._serve)
        self.server = TestServer(app)

    async def _serve(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            answer = self.answer(len(self.requests), body)
            answer = await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self.under_way -= 1
        return answer if isinstance(answer, web.Response) else web.json_response({"choices": [{"message": {"content": answer}}]})

    def judge(self, **changes: Any) -> HttpJudge:
        return HttpJudge(JudgeSpec(**({"url": str(self.server.make_url("/v1")), "model": "m", "max_retries": 2} | changes)))


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(http_judge, "FIRST_PAUSE_S", 0.01)
    found = Service()
    await found.server.start_server()
    yield found
    await found.server.close()


async def test_the_judge_asks_with_prompt_and_both_answers_at_temperature_0(service: Service) -> None:
    service.answer = lambda number, body: "B" if "{a} good" in body["messages"][0]["content"].split("Answer B:")[1] else "A"
    pairs = [["bad", "{a} good"], ["{a} good", "bad"]]
    assert await service.judge().judge([[{"role": "user", "content": "Why {b}?"}]] * 2, pairs) == [1, 0]
    assert service.requests[0] | {"messages": 0} == {"model": "m", "temperature": 0, "max_tokens": 16, "messages": 0}
    assert "user: Why {b}?" in service.requests[0]["messages"][0]["content"]


async def test_the_key_comes_from_the_environment_and_goes_into_the_header_only(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    service.answer = lambda number, body: web.Response(status=401, text="who are you?")
    with pytest.raises(RewardFailed, match=r"status 401: who are you.*check the key in JUDGE_KEY") as caught:
        await service.judge(api_key_env="JUDGE_KEY").judge(["p"], [["x", "y"]])
    assert service.headers[0]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in str(caught.value) + json.dumps(service.requests)
    assert len(service.requests) == 1, "a refusal that will not pass was asked again"


def test_a_key_that_is_not_there_is_named_before_training() -> None:
    spec = JudgeSpec(url="http://localhost:1/v1", model="m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(RewardImportFailed, match=r"NO_SUCH_KEY \(apiKeyEnv\) is not set.*secretKeyRef"):
        load_rewards([RewardSpec(judge=spec)])


async def test_a_busy_service_is_asked_again_after_the_pause_it_wants(service: Service) -> None:
    service.answer = lambda number, body: web.Response(status=429, headers={"Retry-After": "1"}) if number == 1 else "B"
    began = time.monotonic()
    assert await service.judge().judge(["p"], [["x", "y"]]) == [1]
    assert time.monotonic() - began >= 1


async def test_a_service_that_stays_down_is_given_up_and_named(service: Service) -> None:
    service.answer = lambda number, body: web.Response(status=503, text="overloaded")
    with pytest.raises(RewardFailed, match=r"judge m at http://.* failed 3 times, last with status 503: overloaded"):
        await service.judge().judge(["p"], [["x", "y"]])
    assert len(service.requests) == 3


async def test_an_answer_that_does_not_come_has_a_deadline(service: Service) -> None:
    service.answer = lambda number, body: asyncio.sleep(2, "A")
    with pytest.raises(RewardFailed, match=r"failed 1 times, last with no answer within 0\.2 s"):
        await service.judge(timeout_seconds=0.2, max_retries=0).judge(["p"], [["x", "y"]])


async def test_no_more_than_so_many_requests_are_under_way(service: Service) -> None:
    service.answer = lambda number, body: asyncio.sleep(0.02, "A")
    await service.judge(max_concurrency=3).judge(["p"] * 12, [["x", "y"]] * 12)
    assert service.most_under_way == 3


async def test_answers_without_a_winner_are_draws_but_not_if_all_are(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.answer = lambda number, body: "I cannot say" if number == 1 else "A"
    assert sorted(await service.judge().judge(["p"] * 3, [["x", "y"]] * 3)) == [-1, 0, 0]
    assert "1 of 3 answers name no winner, such as 'I cannot say'" in caplog.text
    service.answer = lambda number, body: "I cannot say"
    with pytest.raises(RewardFailed, match=r"named no winner in any of 2 answers, the first 'I cannot say'.*maxTokens"):
        await service.judge().judge(["p"] * 2, [["x", "y"]] * 2)


async def test_a_job_names_a_judge_and_gets_rewards(service: Service) -> None:
    service.answer = lambda number, body: "A" if "Answer A:\ngood" in body["messages"][0]["content"] else "B"
    spec = RewardSpec(judge=JudgeSpec(url=str(service.server.make_url("/v1")), model="m"), weight=2.0)
    rewards = load_rewards([spec])
    table = await asyncio.to_thread(
        rewards.score, prompts=["p"] * 3, completions=["bad", "good", "worse"], completion_ids=[[0]] * 3, columns={}, group_ids=[0, 0, 0]
    )
    assert rewards.names == ["judge:m"]
    assert table.totals[1] == 2.0 == max(table.totals)
