"""OpenAI's shapes over the functions that our own routes call: files, uploads in parts, fine-tuning jobs, models."""
