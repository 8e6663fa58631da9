def render(record: object) -> str:
    return ""
