"""Job execution: Celery task, supervisor, trainer process, sweeper. Only the trainer process imports torch."""

from worker.environment import allocator_environment

__all__ = ["allocator_environment"]
