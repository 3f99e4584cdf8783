"""Answers to questions: VQA accuracy and ANLS; see `vlm.evaluation.vqa`.

    python eval/vqa.py --model runs/stage3 --data vqa.jsonl
    accelerate launch --multi_gpu --num_processes 2 eval/vqa.py ...    # the same metrics

`vlm eval vqa MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("vqa")
