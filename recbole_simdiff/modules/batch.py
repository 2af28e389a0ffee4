"""Names of the columns of a batch that RecBole does not have."""

# Number of pseudo-items at the beginning of a row; absent from ordinary batches.
PSEUDO_LENGTH = "pseudo_length"

# Number of each row of a training batch within the training part, and where in the flat array a
# row of the training part begins.
ROW_NUMBER, ROW_START = "row_number", "_row_start"

# Where a row's history begins in the flat array, and where its target is.
HISTORY_START, TARGET = "_history_start", "_target"
