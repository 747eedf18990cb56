"""How a trace looks: lines as strace writes them, or a JSON object a line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vvupipe.vhost_user.bit_names import Bits
from vvupipe.vhost_user.describe import Side
from vvupipe.vhost_user.messages import FLAG_REPLY
from vvupipe.vhost_user.tracer import Exchange, Lines, Tracer

log = logging.getLogger(__name__)

_HEX_BYTES = 32  # of a payload in a line for people; JSON has all of it
_FULL_S = 0.01  # until a terminal that another program made non-blocking takes more


class Sink(Protocol):
    """Where bytes go at once: an unbuffered binary file."""

    def write(self, data: bytes, /) -> int | None:
        """How many bytes it took; None: none, for now. Raises: OSError."""


class _Output:
    """Lines to a sink. Passing messages on is what a trace's user needs most: it goes on when nobody reads any more."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink

    def write(self, line: str) -> None:
        data = f"{line}\n".encode(errors="backslashreplace")
        while self._sink and data:
            try:
                taken = self._sink.write(data)
            except OSError as error:
                self._sink = None
                log.error("the trace ends here, the messages still pass: %s", error.strerror)
                return
            if taken is None:
                time.sleep(_FULL_S)
            else:
                data = data[taken:]


def trace_lines(sink: Sink, *, as_json: bool, label: str = "") -> Lines:
    """A trace to `sink`. label: which proxy, when a VM has several."""
    return JsonLines(sink, label) if as_json else TextLines(sink, label)


@dataclass(frozen=True, slots=True)
class TraceOutput:
    """Where the traces of a VM's proxies go."""

    sink: Sink
    as_json: bool = False

    def tracer(self, label: str) -> Tracer:
        """A tracer whose lines begin with `label`, empty for none."""
        return Tracer(trace_lines(self.sink, as_json=self.as_json, label=label))


class TextLines:
    """Implements tracer.Lines for people. label: which proxy, when there are several."""

    def __init__(self, sink: Sink, label: str = "") -> None:
        self._output = _Output(sink)
        self._label = f"{label} " if label else ""

    def note(self, stay: int, event: str, text: str) -> None:
        """See tracer.Lines."""
        mark = "+++" if event == "disconnected" else "---"
        self._write(time.time(), f"{mark} front-end {stay} {text} {mark}")

    def done(self, exchange: Exchange) -> None:
        """See tracer.Lines."""
        if exchange.reply is None:
            self._write(exchange.time_s, f"{_who(exchange.requester)} {_call(exchange)}")
        elif exchange.told:
            self._write(time.time(), f"{_who(exchange.requester)} <... {exchange.name} resumed> {_result(exchange)}")
        else:
            self._write(exchange.time_s, f"{_who(exchange.requester)} {_call(exchange)} {_result(exchange)}")

    def unfinished(self, exchange: Exchange) -> None:
        """See tracer.Lines."""
        self._write(exchange.time_s, f"{_who(exchange.requester)} {_call(exchange)} <unfinished ...>")

    def unanswered(self, exchange: Exchange) -> None:
        """See tracer.Lines."""
        call = f"<... {exchange.name} resumed>" if exchange.told else _call(exchange)
        self._write(time.time() if exchange.told else exchange.time_s, f"{_who(exchange.requester)} {call} = ?")

    def stray(self, sender: Side, exchange: Exchange) -> None:
        """See tracer.Lines."""
        what = "reply to nothing" if sender is not exchange.requester else "reply by who asks"
        if not exchange.flags & FLAG_REPLY:
            what = "request on the wrong way"
        self._write(exchange.time_s, f"{_who(sender)} {_call(exchange)} <{what}>")

    def _write(self, time_s: float, text: str) -> None:
        microseconds = int(time_s * 1e6) % 1_000_000
        clock = time.strftime("%H:%M:%S", time.localtime(time_s))
        self._output.write(f"{clock}.{microseconds:06} {self._label}{text}")


def _who(side: Side) -> str:
    return f"{side:<9}"


def _call(exchange: Exchange) -> str:
    return f"{exchange.name}({', '.join(_parts(exchange.fields, exchange.fds))})"


def _result(exchange: Exchange) -> str:
    reply = exchange.reply or {}
    if len(reply) == 1 and not exchange.reply_fds:
        (text,) = map(_text, reply.values())
        if "failed" in reply:
            text = "-1"
    else:
        text = ", ".join(_parts(reply, exchange.reply_fds)) or "()"
    refused = " (refused)" if exchange.refused else ""
    return f"= {text}{refused} <{(exchange.elapsed_ns or 0) / 1e9:.6f}>"


def _parts(fields: Mapping[str, Any], fds: list[str]) -> list[str]:
    parts = [f"{name}={_text(value)}" for name, value in fields.items()]
    if len(fds) == 1:
        parts.append(f"fd=<{_printable(fds[0])}>")
    elif fds:
        parts.append(f"fds=[{', '.join(f'<{_printable(fd)}>' for fd in fds)}]")
    return parts


def _text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case bytes():
            rest = f"...({len(value)} bytes)" if len(value) > _HEX_BYTES else ""
            return f"{value[:_HEX_BYTES].hex()}{rest}" if value else '""'
        case dict():
            return f"{{{', '.join(_parts(value, []))}}}"
        case list():
            return f"[{', '.join(map(_text, value))}]"
        case str() if " " in value:
            return f'"{value}"'
    return str(value)


def _printable(text: str) -> str:
    """A path is what a peer likes it to be: no line of ours may come from it."""
    return text if text.isprintable() else ascii(text)[1:-1]


class JsonLines:
    """Implements tracer.Lines for programs; each object has "event", "time" (s since the epoch) and "stay"."""

    def __init__(self, sink: Sink, label: str = "") -> None:
        self._output = _Output(sink)
        self._label = {"proxy": label} if label else {}

    def note(self, stay: int, event: str, text: str) -> None:
        """See tracer.Lines."""
        self._write({"event": event, "time": time.time(), **self._label, "stay": stay, "text": text})

    def done(self, exchange: Exchange) -> None:
        """See tracer.Lines. `told` before: the object is whole again, and says that it was begun before."""
        self._write(self._object("message", exchange))

    def unfinished(self, exchange: Exchange) -> None:
        """See tracer.Lines."""
        self._write(self._object("unfinished", exchange))

    def unanswered(self, exchange: Exchange) -> None:
        """See tracer.Lines."""
        self._write(self._object("unanswered", exchange))

    def stray(self, sender: Side, exchange: Exchange) -> None:
        """See tracer.Lines."""
        self._write({**self._object("stray", exchange), "from": sender.value})

    def _object(self, event: str, exchange: Exchange) -> dict[str, Any]:
        elapsed = exchange.elapsed_ns
        return {
            "event": event,
            "time": exchange.time_s,
            **self._label,
            "stay": exchange.stay,
            "from": exchange.requester.value,
            "name": exchange.name,
            "request": exchange.request,
            "flags": exchange.flags,
            "need_reply": exchange.need_reply,
            "fields": exchange.fields,
            "fds": exchange.fds,
            "reply": exchange.reply,
            "reply_fds": exchange.reply_fds,
            "elapsed_us": None if elapsed is None else elapsed / 1000,
            "refused": exchange.refused,
            "resumed": exchange.told and exchange.reply is not None,
        }

    def _write(self, fields: dict[str, Any]) -> None:
        self._output.write(json.dumps(fields, default=_plain))


def _plain(value: Any) -> Any:
    """What json does not know: payload bytes as hexadecimal digits, bits with their names."""
    if isinstance(value, bytes):
        return value.hex()
    assert isinstance(value, Bits)
    return {"value": value.value, "names": value.names}
