"""HTTP only: routes, schemas, errors as problem details."""
