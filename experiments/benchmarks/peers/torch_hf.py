# pyright: basic
# (torch is not in the environment, so nothing of it has a type.)
"""What `transformers` makes of exported folders, by an interpreter that has it, torch and NumPy.

`python -m experiments.benchmarks.peers.torch_hf FOLDER...`, from the root of the repository. Each folder holds `llama`
(the export), `tokens.npy` and `prompt.npy`; written into it are `theirs.npz` (logits, loss, greedy tokens, ids of the
text in `text.txt`) and `resaved`, the model as `transformers` itself saves it.
"""

import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # noqa: TID251 - a peer, run by an interpreter of its own
import transformers
from transformers import AutoTokenizer, LlamaForCausalLM


def main() -> None:
    """Answers for each folder."""
    torch.set_float32_matmul_precision("highest")
    for folder in map(Path, sys.argv[2:]):
        model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
        tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
        prompt = torch.from_numpy(np.load(folder / "prompt.npy")).long()
        with torch.no_grad():
            answer = model(tokens, labels=tokens)
            greedy = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=int(sys.argv[1]),
                do_sample=False,
                pad_token_id=0,
            )
        ids = tokenizer((folder / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
        np.savez(
            folder / "theirs.npz",
            logits=answer.logits.numpy(),
            loss=answer.loss.numpy(),
            greedy=greedy[0, prompt.shape[1] :].numpy(),
            ids=np.asarray(ids),
        )
        model.save_pretrained(folder / "resaved")
        tokenizer.save_pretrained(folder / "resaved")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
