"""What the API and the worker share: settings, database, job lifecycle, files, the queue. No HTTP, no tensors."""
