# One entry point. `make help` lists what there is.
SHELL      := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO         ?= go
GOARCH     ?= $(shell $(GO) env GOARCH)
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
PKG        := github.com/cloudos-io/cloudos
LDFLAGS    := -s -w -X $(PKG)/api.Version=$(VERSION) -X main.version=$(VERSION)
BIN        := bin
PROGRAMS   := servin servind servin-runtime servin-compose cloudos cloudos-image cloudos-init cloudos-modprobe cloudos-seal servin-vmd
export CGO_ENABLED := 0

.PHONY: help build arm64 buildd scan deps shim hello run test test-unit test-e2e test-long bench check fuzz cross install clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

deps: ## Install what building and running need (Debian packages; needs root)
	@scripts/deps build

build: shim hello ## Build every program into bin/
	@mkdir -p $(BIN)
	$(GO) build -tags nri_no_wasm,grpcnotrace -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ $(PROGRAMS:%=./cmd/%) # ADR 14, 55
	@install -m 755 internal/shim/bin/servin-shim-$(GOARCH) $(BIN)/servin-shim # for images
	@scripts/toolbox-image $(BIN)/servin-toolbox.tar.gz
	@$(MAKE) --no-print-directory buildd scan

# A Go module of its own: BuildKit's dependencies stay out of the engine's go.mod. -mod=mod: it follows
# the engine's requirements without being told.
BUILDKIT := v0.33.1
buildd: ## Build the builder of images, servin-buildd
	@mkdir -p $(BIN)
	cd buildd && $(GO) build -mod=mod -tags grpcnotrace -trimpath -ldflags '$(LDFLAGS) -X github.com/moby/buildkit/version.Version=$(BUILDKIT)' -o ../$(BIN)/ ./cmd/...

# A Go module of its own, too: the libraries of syft, grype and Sigstore (ADR 34).
scan: ## Build the scanner of images, servin-scan
	@mkdir -p $(BIN)
	cd scan && $(GO) build -mod=mod -tags grpcnotrace -trimpath -ldflags '$(LDFLAGS)' -o ../$(BIN)/ ./cmd/...

shim: ## Build the static C program that the engine embeds
	@$(MAKE) --no-print-directory -C shim GOARCH=$(GOARCH)

hello: ## Build the image that the engine embeds
	@scripts/hello-image $(GOARCH)

arm64: ## Build the programs of arm64 images on another computer, into bin/arm64
	@scripts/deps arm64
	@[ $$($(GO) env GOHOSTARCH) = arm64 ] || VERSION='$(VERSION)' BUILDKIT=$(BUILDKIT) scripts/cross arm64

run: ## Build, start the engine and run a first container
	@scripts/deps build
	@$(MAKE) --no-print-directory build
	@scripts/first-run

test: ## Units and the native end-to-end suite (needs root; 30 minutes cold at most)
	@scripts/deps test
	@$(MAKE) --no-print-directory build
	@scripts/test short

test-long: ## Fault, leak and fuzz campaigns
	@scripts/deps long
	@$(MAKE) --no-print-directory build arm64
	@scripts/test long

bench: ## Measure beside Docker, Podman, containerd, crun and runc
	@scripts/deps bench
	@$(MAKE) --no-print-directory build
	@bench/run

check: ## Format, vet, staticcheck, dependency arrows, cross builds
	@scripts/check

cross: ## Build the command lines, servin and cloudos, for every platform, and servin-vmd for macOS and Windows
	@for p in linux/amd64 linux/arm64 linux/arm darwin/amd64 darwin/arm64 windows/amd64 windows/arm64; do \
	  exe=; case $$p in windows/*) exe=.exe ;; esac; \
	  vmd=; case $$p in darwin/*|windows/*) vmd=servin-vmd ;; esac; \
	  for c in servin cloudos $$vmd; do echo "$$c $$p"; GOOS=$${p%/*} GOARCH=$${p#*/} GOARM=7 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o dist/$$c-$${p%/*}-$${p#*/}$$exe ./cmd/$$c; done; done

fuzz: ## Fuzz every parser for a minute each
	@scripts/fuzz $${FUZZTIME:-60s}

install: build ## Install into PREFIX (default /usr/local) with a systemd unit
	@scripts/install

clean: ## Remove what build made
	rm -rf $(BIN) dist
	@$(MAKE) --no-print-directory -C shim clean
