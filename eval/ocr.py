"""Reading of text: CER, WER, exact lines and speed; see `vlm.evaluation.ocr`.

    python eval/ocr.py --model line-reader --peer tesseract
    accelerate launch --multi_gpu --num_processes 2 eval/ocr.py ...    # the same metrics

`vlm eval ocr MODEL` is the same with the same options.
"""

from vlm.evaluation import main

if __name__ == "__main__":
    main("ocr")
