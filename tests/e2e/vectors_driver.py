"""What vLLM's own `LLM.embed` makes of texts: `vectors_driver.py MODEL MAX_MODEL_LEN TEXTS`; JSON in, JSON out."""

import os
import sys

import msgspec

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

if __name__ == "__main__":
    from vllm import LLM

    model, max_model_len, texts = sys.argv[1:]
    llm = LLM(
        model,
        runner="pooling",
        convert="embed",
        dtype="float32",
        max_model_len=int(max_model_len),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
    )
    vectors = [output.outputs.embedding for output in llm.embed(msgspec.json.decode(texts))]
    sys.stdout.write(f"vectors {msgspec.json.encode(vectors).decode()}\n")
