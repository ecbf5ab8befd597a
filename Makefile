# Everything a person does with this tree. `make help` lists it.
#
# Variables: PREFIX (/usr/local), DESTDIR (empty), RUNTIMES, SUITES and FILTER for `make suites`.

PREFIX  ?= /usr/local
DESTDIR ?=
BUILD   := $(CURDIR)/build
TARGET  := x86_64-unknown-linux-gnu
HOST    := target/release/kata
AGENT   := target/$(TARGET)/agent/kata-agent
IMAGE   := $(BUILD)/share/kata-containers
# The development tree's own runtime: the built binary with the built image, nothing installed.
RUNTIME := $(BUILD)/bin/kata-runtime
SHARE   := $(DESTDIR)/usr/share/kata-containers
RUNTIMES ?= runc kata-runtime
RUN_SUITES = cargo run $(CARGO_FLAGS) -q -p suites -- $(addprefix --runtime ,$(RUNTIMES:kata-runtime=kata-runtime=$(BUILD)/bin/kata/kata-runtime)) --config $(BUILD)/config.toml
CARGO_FLAGS ?= --locked
SUITES  ?= oci docker podman containerd cri crash
FILTER  ?=

.DEFAULT_GOAL := help
.PHONY: help demo build image test suites validate soak bench install uninstall clean FORCE

help: ## Say what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## Install what is needed, build everything, and run a command in a virtual machine
	@scripts/setup.sh build guest
	@$(MAKE) --no-print-directory build image
	@scripts/demo.sh $(RUNTIME)

test: ## Install what the tests need and run all of them
	@scripts/setup.sh build guest test
	@scripts/test.sh

build: $(HOST) $(AGENT) $(RUNTIME) ## Build the host's and the guest's programs

$(HOST): FORCE
	@scripts/say.sh "building the host program kata"
	@cargo build $(CARGO_FLAGS) --release -p kata --bin kata

$(AGENT): FORCE
	@scripts/say.sh "building the guest program kata-agent"
	@RUSTFLAGS="-C target-feature=+crt-static" \
	 LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
	 cargo build $(CARGO_FLAGS) -p agent --profile agent --target $(TARGET)

$(RUNTIME): Makefile
	@mkdir -p $(BUILD)/bin
	@printf '#!/bin/sh\nexec %s --config %s "$$@"\n' $(BUILD)/bin/kata/kata-runtime $(BUILD)/config.toml >$@.new
	@mkdir -p $(BUILD)/bin/kata && ln -sfn $(CURDIR)/$(HOST) $(BUILD)/bin/kata/kata-runtime
	@printf '[image]\npath = "%s"\n[template]\ndirectory = "%s"\n' $(IMAGE) $(BUILD)/templates >$(BUILD)/config.toml
	@chmod 0755 $@.new && mv $@.new $@

image: $(IMAGE)/manifest.json ## Make the guest image

$(IMAGE)/manifest.json: $(HOST) $(AGENT) | $(RUNTIME)
	@scripts/say.sh "making the guest image"
	@$(RUNTIME) image build --agent $(AGENT) --output $(IMAGE)

suites: ## Run the black-box suites alone: make suites SUITES=oci RUNTIMES=runc FILTER=exec
	@$(RUN_SUITES) $(if $(FILTER),--filter "$(FILTER)") $(SUITES)

validate: ## Run the OCI validation suite against runc and kata-runtime
	@scripts/setup.sh build guest test
	@$(MAKE) --no-print-directory build image
	@$(RUN_SUITES) validation

soak: ## Run containers two hundred times, one after the other (SOAK=N: so often)
	@scripts/setup.sh build guest test
	@$(MAKE) --no-print-directory build image
	@$(RUN_SUITES) soak

bench: ## Measure kata-runtime beside runc
	@scripts/setup.sh build guest test bench
	@$(MAKE) --no-print-directory build image
	@$(RUN_SUITES) bench

install: ## Put programs and image in place (PREFIX, DESTDIR) and say how to register the runtime
	@$(MAKE) --no-print-directory build image
	@install -D -m 0755 $(HOST) $(DESTDIR)$(PREFIX)/bin/kata
	@for name in kata-runtime containerd-shim-kata-v2; do ln -sfn kata $(DESTDIR)$(PREFIX)/bin/$$name; done
	@install -d -m 0755 $(SHARE)
	@cp $(IMAGE)/* $(SHARE)/
	@scripts/registration.sh $(PREFIX)/bin/kata-runtime

uninstall: ## Remove what `make install` put in place
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,kata kata-runtime containerd-shim-kata-v2)
	rm -rf $(SHARE)

clean: ## Remove what was built
	rm -rf $(BUILD)
	cargo clean
