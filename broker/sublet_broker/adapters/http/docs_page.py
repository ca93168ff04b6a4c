"""/docs: the OpenAPI document as one page that needs no script and nothing from elsewhere."""

import json
import re
from html import escape
from typing import Any

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",
}

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
body{color:#1b1f24}
code,pre{font:14px/1.45 ui-monospace,monospace;background:#f3f4f6;border-radius:4px}
code{padding:0 .25em}pre{padding:.75rem;overflow:auto}table{border-collapse:collapse;margin:.5rem 0}
td,th{border:1px solid #d5d9de;padding:.2rem .5rem;text-align:left;vertical-align:top}
details{border:1px solid #d5d9de;border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}
summary{cursor:pointer}.m{display:inline-block;width:3.6rem;font-weight:600}h2{margin-top:2rem}
@media(prefers-color-scheme:dark){body{background:#111418;color:#e6e8ea}code,pre{background:#20252b}}
"""


def page(document: dict[str, Any]) -> str:
    """Return the page."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>",
        _prose(info["description"]),
        "<p>For machines: <a href=/openapi.json>/openapi.json</a></p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p>")
        for path, methods in document["paths"].items():
            for method, call in methods.items():
                if call.get("tags", [""])[-1] == tag["name"]:
                    parts.append(_call(path, method, call))
    parts.append("<h2>Shapes</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(_shape(name, schema))
    return "\n".join(parts)


def _call(path: str, method: str, call: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(p['name'])}</code><td>{escape(p['in'])}"
        f"<td>{escape(p.get('description') or p['schema'].get('description', ''))}"
        for p in call.get("parameters", [])
    ]
    body = call.get("requestBody")
    if body:
        kind, content = next(iter(body["content"].items()))
        rows.append(
            f"<tr><td>body<td>{_type(content['schema'])} <small>{escape(kind)}</small>"
            f"<td>{escape(body['description'])}"
        )
    answers = []
    for status, answer in sorted(call["responses"].items()):
        of: dict[str, Any] = next(iter(answer.get("content", {}).values()), {})
        answers.append(
            f"<tr><td>{escape(status)}<td>{_type(of.get('schema', {}))}"
            f"<td>{escape(answer['description'])}"
        )
    example = ""
    if body and "example" in next(iter(body["content"].values())):
        shown = json.dumps(next(iter(body["content"].values()))["example"], indent=2)
        example = f"<pre>{escape(shown)}</pre>"
    signed = "" if call.get("security") else " <small>(unsigned)</small>"
    return (
        f"<details><summary><span class=m>{method.upper()}</span> <code>{escape(path)}</code> "
        f"{escape(call.get('summary', ''))}{signed}</summary>"
        f"<p>{escape(call.get('description', ''))}</p>"
        f"<table>{''.join(rows)}</table>{example}<table>{''.join(answers)}</table></details>"
    )


def _shape(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(field)}</code>{'' if field in required else ' ?'}<td>{_type(of)}"
        f"<td>{escape(of.get('description', ''))}"
        for field, of in schema.get("properties", {}).items()
    ]
    values = ", ".join(f"<code>{escape(str(v))}</code>" for v in schema.get("enum", []))
    says = escape(schema.get("description", ""))
    return (
        f"<details id={escape(name)}><summary><code>{escape(name)}</code></summary>"
        f"<p>{says} {values}</p><table>{''.join(rows)}</table></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return escape(str(schema.get("type", "")))


def _prose(text: str) -> str:
    """Render the little Markdown that the description uses."""
    blocks = []
    for block in text.strip().split("\n\n"):
        shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(block))
        shown = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", shown)
        if block.startswith("|"):
            lines = [line.strip("|").split("|") for line in shown.splitlines()]
            cells = ["".join(f"<td>{cell.strip()}" for cell in line) for line in lines]
            rows = [row for row in cells if "---" not in row]
            blocks.append("<table>" + "".join(f"<tr>{row}" for row in rows) + "</table>")
        else:
            blocks.append(f"<p>{shown}</p>")
    return "\n".join(blocks)
