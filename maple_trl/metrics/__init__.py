"""Pure metrics: accuracy, gaps, intervals, significance, spread."""
