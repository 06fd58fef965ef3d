"""Mixed-task batches to answers: the bank of adapters on the device, passes, the scheduler."""
