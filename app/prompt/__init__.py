"""From a parsed body to named blocks: templates, tokenizers, the models known."""
