"""Retrieval between images and captions; see `vlm.evaluation.retrieval`.

    python eval/retrieval.py --model runs/contrastive
    accelerate launch --multi_gpu --num_processes 2 eval/retrieval.py ...    # the same metrics

`vlm eval retrieval MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("retrieval")
