from hub.conftest import hub  # noqa: F401
