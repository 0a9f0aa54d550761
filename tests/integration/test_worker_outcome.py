"""What an attempt comes to when the supervisor itself could not go on at its end."""

from __future__ import annotations

from sqlalchemy import Engine

from service.database import transaction
from service.models import Job
from service.settings import Settings
from service.status import Desired
from service.storage import Storage
from tests.integration.seed import add_checkpoint, claim
from worker.ledger import Ledger
from worker.messages import Checkpoint, Done, Failure
from worker.outcome import Ending, conclude
from worker.publisher import LocalPublisher

BROKEN = Failure("supervisor_error", "InternalError: read only", None, None)


def test_what_was_discarded_is_no_final_checkpoint(
    bind: Engine, storage: Storage, settings: Settings, job: Job
) -> None:
    ledger = Ledger(bind, LocalPublisher(storage), claim(bind, job.id), settings)
    ledger.add(Checkpoint(20, "step-00000020", [], None))
    assert (ledger.last_checkpoint, ledger.progressed) == (20, True)
    ledger.discard()
    assert (ledger.last_checkpoint, ledger.progressed) == (None, False)


def test_a_job_whose_end_could_not_be_written_has_not_succeeded(bind: Engine, storage: Storage, job: Job) -> None:
    """Its output would be an older checkpoint than the one that the trainer ended with."""
    run = claim(bind, job.id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, run, 10)
        done = Done(20, "completed")
        ended = conclude(session, run, Desired.RUN, Ending(20, 0, done, BROKEN, final_checkpoint=True))
        assert (ended.status, ended.output_model_id) == ("queued", None)
    again = claim(bind, job.id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, again, 20)
        ended = conclude(session, again, Desired.RUN, Ending(20, 0, done, final_checkpoint=True))
        assert ended.status == "succeeded"
