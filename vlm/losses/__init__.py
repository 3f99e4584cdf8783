"""Losses: functions over tensors, which know no model and no trainer."""
