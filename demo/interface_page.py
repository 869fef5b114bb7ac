"""The page that describes the HTTP endpoint: made from its OpenAPI description, without scripts of other servers."""

from html import escape
from typing import Any

STYLE = """
body {font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222}
section {border: 1px solid #ccc; border-radius: 6px; padding: 0 1rem 1rem; margin: 1rem 0}
h2 {font: bold 1.1rem monospace} h2 b {background: #246; color: #fff; padding: .1rem .5rem; border-radius: 4px}
pre {background: #f4f4f4; padding: .6rem; overflow-x: auto; margin: .5rem 0}
pre:empty {display: none} label {margin-right: 1rem}
td, th {text-align: left; padding-right: 1.5rem; vertical-align: top; font-weight: normal} th {color: #666}
input[type=text] {width: 20rem; padding: .2rem} button {padding: .2rem 1rem}
"""
SCRIPT = """
for (const form of document.forms) form.onsubmit = async event => {
  event.preventDefault()
  const url = new URL(form.dataset.path, location), answer = form.nextElementSibling
  const options = {method: form.dataset.method}
  for (const field of form.querySelectorAll("input[type=text]")) url.searchParams.set(field.name, field.value)
  const file = form.querySelector("input[type=file]")
  if (file) options.body = file.files[0]
  answer.textContent = "..."
  try {
    const found = await fetch(url, options)
    answer.textContent = found.status + " " + found.statusText + "\\n" + await found.text()
  } catch (error) { answer.textContent = error }
}
"""


def interface_page(description: dict[str, Any]) -> str:
    """Return the page of an OpenAPI description, with a form that tries each operation."""
    title = escape(description["info"]["title"])
    found = [
        section(path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>Machine-readable: <a href="openapi.json">openapi.json</a></p>{"".join(found)}'
        f"<script>{SCRIPT}</script></html>"
    )


def section(path: str, method: str, operation: dict[str, Any]) -> str:
    """Return the part of an operation: what it does, takes and returns, and a form."""
    names, inputs = [field["name"] for field in operation.get("parameters", ())], []
    query, body, takes = "&".join(f"{name}=..." for name in names), "", [f"{name}: text" for name in names]
    if "requestBody" in operation:
        body = "--data-binary @a.jpg "
        takes.append("body: an image, as a file has it")
        inputs.append('<label>image <input type="file" accept="image/*" required></label>')
    inputs += [f'<label>{name} <input type="text" name="{name}" required></label>' for name in names]
    curl = escape(f"curl {body}'http://HOST{path}{'?' if query else ''}{query}'")
    rows = [("takes", text) for text in takes]
    rows += [("returns", f"{status}: {found['description']}") for status, found in operation["responses"].items()]
    table = "".join(f"<tr><th>{label}<td>{escape(text)}" for label, text in rows)
    return (
        f"<section><h2><b>{method.upper()}</b> {path}</h2><p>{escape(operation.get('description', ''))}</p>"
        f'<table>{table}</table><pre>{curl}</pre><form data-path="{path.lstrip("/")}" data-method="{method.upper()}">'
        f"{''.join(inputs)}<button>Try</button></form><pre></pre></section>"
    )
