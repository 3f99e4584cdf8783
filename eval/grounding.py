"""Boxes of phrases: accuracy at IoU 0.5 and AP; see `vlm.evaluation.grounding`.

    python eval/grounding.py --model RUN --data scenes:200:seed=77:task=ground:size=mixed
    accelerate launch --multi_gpu --num_processes 2 eval/grounding.py ...    # the same metrics

`vlm eval grounding MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("grounding")
