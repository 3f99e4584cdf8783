"""Captions of held-out images: exact match, CIDEr-D and BLEU-4; see `vlm.evaluation.caption`.

    python eval/caption.py --model runs/stage1 --baseline sample:train
    accelerate launch --multi_gpu --num_processes 2 eval/caption.py ...    # the same metrics

`vlm eval caption MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("caption")
