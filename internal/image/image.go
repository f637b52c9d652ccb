// Package image keeps images: references, registries, content, unpacked layers
// and their collection. Its Service works on one containerd content store and
// metadata database under the engine's root. The engine and the Docker API use
// the Service; the vocabulary is the Docker API's types.
package image

import (
	"context"
	"time"

	"github.com/cloudos-io/cloudos/internal/snapshot"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Resolved is an image made ready for a container: found, unpacked, pinned.
type Resolved struct {
	// ID is the image's id: the digest of its config for Docker compatibility.
	ID digest.Digest
	// Ref is the name it was asked by, familiar form ("busybox:latest").
	Ref      string
	Manifest ocispec.Descriptor
	Platform ocispec.Platform
	Config   ocispec.ImageConfig
	Created  time.Time
	// Healthcheck and Shell are Docker's additions to the OCI config.
	Healthcheck *Healthcheck
	Shell       []string
	OnBuild     []string
	Chain       snapshot.Chain
	Size        int64
}

// Healthcheck as image configurations store it; durations in nanoseconds.
type Healthcheck struct {
	Test          []string      `json:",omitempty"`
	Interval      time.Duration `json:",omitempty"`
	Timeout       time.Duration `json:",omitempty"`
	StartPeriod   time.Duration `json:",omitempty"`
	StartInterval time.Duration `json:",omitempty"`
	Retries       int           `json:",omitempty"`
}

// Progress is one line of work of a pull, push, load or import, in the terms of
// the Docker API's progress stream. ID is the short layer digest, "" for a line
// about the whole.
type Progress struct {
	ID             string
	Action         string // "Pulling fs layer", "Downloading", "Extracting", "Pull complete", …
	Current, Total int64
}

// PullOptions tell what to pull.
type PullOptions struct {
	Ref      string // normalised with distribution/reference rules; digest or tag
	Platform string // "" is the host's
	Auth     *registry.AuthConfig
	AllTags  bool
	// Lazy has layers that allow it be read from the registry as they are used.
	Lazy     bool
	Progress func(Progress) // may be nil; called from several goroutines
	// Admit is asked once it is known what would be fetched, before any layer is; nil
	// admits all. Pulls that have it are one with those of the same AdmitKey alone.
	Admit    func(ctx context.Context, a Admission) error
	AdmitKey string
}

// Admission is what a pull would bring.
type Admission struct {
	Ref string // normalised
	// Target is the digest of the index or manifest that the name leads to, Manifest
	// that of the platform's.
	Target, Manifest digest.Digest
}

// PushOptions tell what to push.
type PushOptions struct {
	Ref      string
	Platform string
	Auth     *registry.AuthConfig
	AllTags  bool
	Progress func(Progress)
}

// RemoveOptions tell how to remove.
type RemoveOptions struct {
	Force, NoPrune bool
	// InUse tells by which containers an image id is used: id of container to
	// whether it is running.
	InUse func(id digest.Digest) map[string]bool
}

// CommitRequest makes an image from a container's changes.
type CommitRequest struct {
	Parent Resolved // zero for none
	Ref    string   // "" leaves it untagged
	Config dockerspec.DockerOCIImageConfig
	// Changes are Dockerfile instructions that Config is changed by.
	Changes []string
	Author  string
	Comment string
	Created time.Time
	// CreatedBy is the history line.
	CreatedBy string
}

// Event is something that happened to an image, for the engine's event bus.
type Event struct {
	Action string // pull, push, tag, untag, delete, load, import, save, prune
	ID     string
	Ref    string
	Labels map[string]string // of the image, where it is still there
}
