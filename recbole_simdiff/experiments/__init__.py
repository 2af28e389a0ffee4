"""From one run to tables and figures: experiments, their records and reports."""
