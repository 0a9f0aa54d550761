"""The reference of the API for people, made from its OpenAPI document: /docs, and pages of the documentation's site."""
