"""What is stored and what is sent: tables and states, the job, XONE's booking, the events. Imports nothing of ours."""
