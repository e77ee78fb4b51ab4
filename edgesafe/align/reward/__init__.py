"""What an answer is worth while training. A reward is never a judge: nothing here is imported by a judge."""
