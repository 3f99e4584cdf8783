"""Zero-shot classification; see `vlm.evaluation.zero_shot`.

    python eval/zero_shot.py --model runs/contrastive --label group
    accelerate launch --multi_gpu --num_processes 2 eval/zero_shot.py ...    # the same metrics

`vlm eval zero-shot MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("zero-shot")
