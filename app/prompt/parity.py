"""Whether this gateway makes the prompts that a worker's own code would make: both turn the same probes into tokens."""

from app.prompt.sandbox import TemplateError
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from planes.probes import Probe, digest
from planes.wire.blocks import Tokens


def rendering_of(template: ChatTemplate | None, tokenizer: Tokenizer) -> str:
    """The digest of the probes.  template: one whose clock stands still at `planes.probes.NOW`."""

    def chat(probe: Probe) -> Tokens | None:
        if template is None:
            return None
        kwargs = {"tools": list(probe.tools)} if probe.tools else None
        try:
            return tokenizer.encode_segments(template.render(probe.messages, kwargs, is_reply=probe.is_reply))
        except TemplateError:
            return None

    return digest(chat, tokenizer.encode_prompt)
