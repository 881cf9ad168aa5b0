.PHONY: check train
check:  ## what CI runs
	bash launch/test.sh
train:
	bash launch/quickstart.sh
