"""What both examples use: starting the job, saving, and what one sees of a run."""
