"""Jobs through their states by the API's verbs and the worker's, in any order, beside a model of what is documented.

A machine of hypothesis draws the verbs; claims stay in play when their run has ended. After each step all rows are
read: every row must be as the model (lifecycle_model.py) has it, and whatever the verb is not about must not have
changed in any column of any table. So a refused write, a final state or a live lease that is touched is seen whoever
touches it. Two verbs at once overlap for certain: the second starts, and waits or ends, before the first commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient

from api.app import create_app
from service import database
from service.ids import new_id
from service.storage import Storage
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.lifecycle_ground import Ground, Verb, as_found, claim, inconsistencies, request, sweep, work
from tests.chaos.lifecycle_model import ENDS, FENCED, FINAL, REPORTS, Answer, Job, World
from tests.integration.seed import add_dataset
from worker import sweeper

GIB = 1 << 30
STEPS = 30
"""Of a run, at most."""
MOST_JOBS = 5
DEVICE_BYTES = 4 * GIB
CAPS = st.sampled_from([GIB, 2 * GIB, 3 * GIB])
IMPOSSIBLE_CAPS = st.sampled_from([1_000, 5 * GIB])
"""Too small for any plan, and too large for the device."""
STRANGER = new_id("job")
ACTIONS = st.sampled_from(["cancel", "pause", "resume"])


class Lifecycle(RuleBasedStateMachine):
    """One run of the machine."""

    ids = Bundle("ids")
    held = Bundle("held")
    """(job, attempt), also of runs that have ended."""

    def __init__(self, ground: Ground) -> None:
        super().__init__()
        self.ground = ground
        self.bind = ground.stage.bind
        ground.clear()
        self.world = World(DEVICE_BYTES)
        self.seen: dict[str, dict[str, Any]] = {}

    def having(self, *statuses: str) -> list[str]:
        return [job_id for job_id, job in self.world.jobs.items() if job.status in statuses]

    # The user

    @rule(target=ids, cap=CAPS, failures=st.sampled_from([0, 1, 8, 9]))
    @precondition(lambda self: len(self.world.jobs) < MOST_JOBS)
    def create(self, cap: int, failures: int) -> str:
        """As after so many lost leases, which a run of the machine is too short for."""
        body = {"model": "performer-tiny", "dataset": self.ground.dataset, "memory_cap": cap, "steps": 1_000}
        answer = self.ground.client.post("/jobs", json={**body, "sequence_length": 128})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        self._sql("UPDATE jobs SET failures = :failures WHERE id = :id", id=job_id, failures=failures)
        self._settle(self.world.with_job(job_id, Job(cap, failures=failures)))
        self._agree(answer.json())
        return job_id

    @rule(job_id=st.one_of(ids, ids, ids, st.just(STRANGER)), action=ACTIONS)
    @precondition(lambda self: self.world.jobs)
    def request(self, job_id: str, action: str) -> None:
        self._ask(job_id, action, *self.world.request(action, job_id))

    @rule(job_id=ids, cap=st.one_of(CAPS, CAPS, IMPOSSIBLE_CAPS))
    def resume_under(self, job_id: str, cap: int) -> None:
        world, status = self.world.resume_under(job_id, cap)
        if status == 200 and not GIB <= cap <= DEVICE_BYTES:
            world, status = self.world, 422
        self._ask(job_id, "resume", world, status, {"memory_cap": cap})

    @rule(job_id=ids)
    def look(self, job_id: str) -> None:
        answer = self.ground.client.get("/jobs", params={"limit": 100}).json()
        listed = [job["id"] for job in answer["data"]]
        assert listed == sorted(self.world.jobs, reverse=True), f"listed are {listed}"
        for job in answer["data"]:
            self._agree(job)
        alone = self.ground.client.get(f"/jobs/{job_id}").json()
        del alone["plan"]["frontier"]  # which lists leave out
        assert alone in answer["data"], f"{job_id} alone is {alone}"

    # The worker

    @rule(target=held, impatient=st.booleans())
    @precondition(lambda self: self.having("queued"))
    def claim(self, impatient: bool) -> Any:
        return _claimed(self._do(claim(self.ground.stage.device, impatient=impatient)))

    @rule(data=st.data(), verb=st.sampled_from(REPORTS))
    @precondition(lambda self: self.having("running"))
    def report(self, data: st.DataObject, verb: str) -> None:
        job_id = data.draw(st.sampled_from(self.having("running")), label="job")
        self._do(self._work(verb, job_id))

    @rule(data=st.data(), verb=st.sampled_from(ENDS))
    @precondition(lambda self: self.having("running"))
    def end(self, data: st.DataObject, verb: str) -> None:
        job_id = data.draw(st.sampled_from(self.having("running")), label="job")
        self._do(self._work(verb, job_id))

    @rule(run=held, verb=st.sampled_from((*REPORTS, *ENDS)))
    def work_of_any_run(self, run: tuple[str, int], verb: str) -> None:
        """Most have ended."""
        self._do(self._work(verb, *run))

    @rule(target=held, run=held, verb=st.sampled_from((*REPORTS, *ENDS)))
    def work_of_a_stale_run(self, run: tuple[str, int], verb: str) -> Any:
        """Its lease has run out, and the job may run elsewhere."""
        if self.world.jobs[run[0]].status == "running":
            self._expire(run[0])
        self._sweep()
        taken = self._do(claim(self.ground.stage.device))
        assert self._do(self._work(verb, *run)) == FENCED
        return _claimed(taken)

    @rule(data=st.data())
    @precondition(lambda self: self.having("running"))
    def expire(self, data: st.DataObject) -> None:
        self._expire(data.draw(st.sampled_from(self.having("running")), label="job"))

    @rule()
    @precondition(lambda self: self.having("running"))
    def sweep(self) -> None:
        self._sweep()

    # Two at once, and by force

    @rule(data=st.data())
    @precondition(lambda self: self.having("queued", "running", "paused"))
    def two_at_once(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.having("queued", "running", "paused")), label="job")
        verbs = [request(action, job_id) for action in ("cancel", "pause", "resume")]
        verbs += [self._work(name, job_id) for name in ("renew", "checkpoint", *ENDS)]
        verbs += [claim(self.ground.stage.device), sweep()]
        first, second = (data.draw(st.sampled_from(verbs), label=place) for place in ("first", "second"))
        self._overlap(first, second)

    @rule()
    @precondition(lambda self: len(self.having("queued")) > 1)
    def two_slots_look(self) -> None:
        self._overlap(claim(self.ground.stage.device), claim(self.ground.stage.device))

    @rule(status=st.sampled_from(["queued", "running", "paused", "succeeded", "failed", "cancelled"]))
    @precondition(lambda self: self.having(*FINAL))
    def force(self, status: str) -> None:
        """Not even SQL leaves a final state."""
        lease = "clock_timestamp()" if status == "running" else "NULL"
        statement = f"UPDATE jobs SET status = :to, lease_until = {lease} WHERE id = :id"
        for job_id in self.having(*FINAL - {status}):
            try:
                self._sql(statement, id=job_id, to=status)
            except DBAPIError as error:
                assert "which is final" in str(error)  # noqa: PT017  # there is more to say if there is none
            else:
                raise AssertionError(f"a job left {self.world.jobs[job_id].status} for {status}")
        self._settle(self.world)

    # How

    def _work(self, verb: str, job_id: str, attempt: int | None = None) -> Verb:
        """Of the job's last attempt, if not of another."""
        job = self.world.jobs[job_id]
        return work(verb, job_id, job.attempt if attempt is None else attempt, job)

    def _expire(self, job_id: str) -> None:
        self._sql("UPDATE jobs SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :id", id=job_id)
        self._settle(self.world.with_job(job_id, replace(self.world.jobs[job_id], expired=True)), {job_id})

    def _sweep(self) -> None:
        world, foreseen = self.world.sweep()
        context = self.ground.client.app.state.context  # type: ignore[attr-defined]
        requeued = sweeper.sweep(self.bind, context.producer, context.storage)
        assert sorted(requeued) == foreseen
        self._settle(world)

    def _ask(self, job_id: str, action: str, world: World, status: Answer, body: dict[str, Any] | None = None) -> None:
        answer = self.ground.client.post(f"/jobs/{job_id}/{action}", json=body)
        assert answer.status_code == status, f"{action}: {answer.status_code} in place of {status}: {answer.text}"
        self._settle(world)
        if status == 200:
            self._agree(answer.json())

    def _do(self, verb: Verb) -> Any:
        world, foreseen = verb.foresee(self.world, None)
        answer = self._transact(verb)
        assert answer == foreseen, f"{verb.name}: {answer} in place of {foreseen}"
        self._settle(world, verb.touched(answer))
        return answer

    def _transact(self, verb: Verb) -> Answer:
        """In a transaction of its own; an error that nobody expects is an answer that no model gives."""
        try:
            with database.transaction(self.bind) as session:
                return verb.act(session)
        except Exception as error:  # noqa: BLE001  # as it says
            return f"{type(error).__name__}: {error}"

    def _overlap(self, first: Verb, second: Verb) -> None:
        """The outcome is that of one order or the other; what passes a locked row may do so."""
        with database.transaction(self.bind) as session:
            one = first.act(session)
            future = self.ground.pool.submit(self._transact, second)
            while not _done(future) and not self.ground.waiting_for_a_lock():
                pass
        two = future.result()
        rows = self.ground.rows()
        told = []
        for order in self._orders(first, second):
            world, answers = self._foretold(*order)
            wrong = [*self._differences(world, rows)] if answers == (one, two) else [f"{answers} were the answers"]
            if not wrong:
                self._settle(world, first.touched(one) | second.touched(two))
                return
            told.append(f"{order[0]}: {wrong}")
        raise AssertionError(f"{first.name} beside {second.name} gave {(one, two)}, as in no order: {'; '.join(told)}")

    @staticmethod
    def _orders(first: Verb, second: Verb) -> Iterator[tuple[str, Verb, Verb, str | None]]:
        yield "in order", first, second, None
        yield "the other way round", second, first, None
        if first.locks is not None:
            yield "passing the locked job", first, second, first.locks

    def _foretold(self, name: str, one: Verb, two: Verb, locked: str | None) -> tuple[World, tuple[Answer, Answer]]:
        world, answer = one.foresee(self.world, None)
        world, other = two.foresee(world, locked)
        return world, ((other, answer) if name == "the other way round" else (answer, other))

    def _sql(self, statement: str, **values: object) -> None:
        self.ground.connection.execute(text(statement), values)

    # What must be

    def _settle(self, world: World, touched: Collection[str] = ()) -> None:
        """Every row is as `world` has it, and none has changed but those that the model changed or that are named."""
        rows = self.ground.rows()
        wrong = [*self._differences(world, rows)]
        for job_id, before in self.seen.items():
            after, job = rows[job_id], self.world.jobs[job_id]
            if after["log"][: len(before["log"])] != before["log"]:
                wrong.append(f"{job_id}: an event has changed")
            may_change = job_id in touched or world.jobs[job_id] != job
            if after != before and (job.status in FINAL or not may_change):
                columns = [name for name in after["row"] if after["row"][name] != before["row"][name]]
                wrong.append(f"{job_id}, {job.status}: changed, in {columns}")
        assert not wrong, "; ".join(wrong)
        self.world, self.seen = world, rows

    def _differences(self, world: World, rows: dict[str, dict[str, Any]]) -> Iterator[str]:
        """Between the database and the model, and between the database and itself."""
        if rows.keys() != world.jobs.keys():
            yield f"the jobs are {sorted(rows)}"
            return
        for job_id, job in world.jobs.items():
            found = as_found(rows[job_id], job)
            if found != job:
                yield f"{job_id} is {found}, not {job}"
            yield from (f"{job_id}: {problem}" for problem in inconsistencies(rows[job_id]))
        if world.free_bytes < 0:
            yield f"the caps of the running jobs pass the device by {-world.free_bytes} bytes"
        reserved = self.ground.connection.execute(text("SELECT reserved_for FROM devices")).scalar()
        if reserved != world.reserved:
            yield f"the device is kept free for {reserved}, not {world.reserved}"

    def _agree(self, answer: dict[str, Any]) -> None:
        """What the API says of a job is what its row says."""
        row = self.seen[answer["id"]]["row"]
        said = {name: answer[name] for name in ("status", "desired", "attempt", "measured_peak_bytes")}
        said |= {"step": answer["progress"]["step"], "tokens": answer["progress"]["tokens"]}
        said |= {"memory_cap_bytes": answer["memory_cap"], "output_model_id": answer["output_model"]}
        stored = {name: row[name] for name in said}
        assert said == stored, f"the API says {said}, the row {stored}"
        assert (answer["error"] or {}).items() >= (row["error"] or {}).items(), f"the API says {answer['error']}"


def _claimed(taken: Any) -> Any:
    """For the bundle of claims."""
    return multiple() if taken is None else taken


def _done(future: Future[Answer]) -> bool:
    return bool(wait([future], timeout=0.001).done)


def lifecycle(arena: Arena, cycles: int) -> Iterator[str]:
    """So many runs of the machine; the first that goes wrong is told, cut down to the steps that it takes."""
    with ExitStack() as stack:
        stage = stack.enter_context(arena.stage(device_memory_bytes=DEVICE_BYTES))
        client = stack.enter_context(TestClient(create_app(stage.settings), base_url="http://127.0.0.1"))
        dataset = add_dataset(stage.bind, Storage(stage.settings.data_dir)).id
        connection = stack.enter_context(stage.bind.connect().execution_options(isolation_level="AUTOCOMMIT"))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        ground = Ground(stage, client, dataset, connection, pool)

        @hypothesis.seed(arena.seed)
        class Seeded(Lifecycle):
            def __init__(self) -> None:
                super().__init__(ground)

        phases = [Phase.generate] if arena.guard else [Phase.generate, Phase.shrink]
        settings = hypothesis.settings(
            max_examples=cycles, stateful_step_count=STEPS, deadline=None, database=None, print_blob=False,
            phases=phases, report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        try:
            run_state_machine_as_test(Seeded, settings=settings)
        except AssertionError as error:
            yield "\n".join([str(error), *getattr(error, "__notes__", [])])


LIFECYCLE = (
    Fault(
        "lifecycle",
        "the verbs of users and workers in any order, two at once too; as documented, and final states stay",
        "runs of the machine",
        full=2_000,
        short=40,
        inflict=lifecycle,
        guards=("fence", "final states", "row lock of a request", "device lock"),
    ),
)
