// Package checkpoint is the format of checkpoints: a directory of an engine's and
// the tar that carries one to another engine.
//
// Vocabulary. A checkpoint's *manifest* ("checkpoint.json") says which container
// it is of and how it was made; its *parts* are CRIU's images in rounds
// ("criu/1/…", the last one being the processes as they stood), the writable layer
// ("layer.tar"), volumes ("volumes/1.tar.zst") and the image ("image.tar"). What was
// not known at the beginning of a stream stands in a second manifest
// ("final.json"). The *seal* ("seal.json"), the last entry, holds size and digest of every file before
// it. A checkpoint without a seal is none. A *cold* one has no processes: the
// container was stopped, and is started.
//
// Whoever reads one reads what a stranger wrote: names, sizes and counts are
// bounded here, and nothing is used before the seal was found to fit. Package
// engine imports it.
package checkpoint

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// Version is the layout that is written; earlier ones are read.
const Version = 1

// Names of the entries.
const (
	ManifestName = "checkpoint.json"
	FinalName    = "final.json"
	SealName     = "seal.json"
	LayerName    = "layer.tar"
	ImageName    = "image.tar"
	imagesDir    = "criu"
	volumesDir   = "volumes"
	// parentName is what CRIU looks for the round before under.
	parentName = "parent"
)

// Bounds of what is read.
const (
	maxManifest = 4 << 20
	maxSeal     = 64 << 20
	maxFiles    = 100_000
	// MaxRounds is how often memory may be written down.
	MaxRounds  = 32
	maxVolumes = 256
	maxBinds   = 250
)

// Manifest describes a checkpoint.
type Manifest struct {
	Version int
	Created time.Time
	// Engine is the version that wrote it; Kernel and Arch are of its host, CRIU
	// the version of CRIU, 0 in a cold one.
	Engine, Kernel, Arch string
	CRIU                 int  `json:",omitempty"`
	Cold                 bool `json:",omitempty"`
	// Stopped: the container did not run, and is not started.
	Stopped   bool `json:",omitempty"`
	Container Container
	// Rounds is how many directories of CRIU's images there are.
	Rounds int `json:",omitempty"`
	// Streams and Binds are runtime.CheckpointResult's.
	Streams                   [3]string `json:",omitzero"`
	Binds                     []string  `json:",omitempty"`
	TCPEstablished, FileLocks bool      `json:",omitempty"`
	Volumes                   []Volume  `json:",omitempty"`
	// WithImage: the image is carried.
	WithImage bool `json:",omitempty"`
}

// Container is what a container is made again from. It is a request like any
// other: who restores it must be allowed to make it.
type Container struct {
	ID, Name   string
	Config     *mcontainer.Config
	HostConfig *mcontainer.HostConfig
	Extra      api.CreateExtra                      `json:",omitzero"`
	Endpoints  map[string]*network.EndpointSettings `json:",omitempty"`
	// Attached are the endpoints with their addresses, if it ran.
	Attached map[string]*network.EndpointSettings `json:",omitempty"`
	Image    Image
	Started  time.Time `json:",omitzero"`
}

// Image names an image; ID and Digest are what counts.
type Image struct {
	ID, Ref  string
	Digest   digest.Digest `json:",omitempty"`
	Platform ocispec.Platform
}

// Volume is a volume whose content is carried in volumes/N.tar.zst, N its place in
// the list from 1 on.
type Volume struct{ Name, Target string }

// RoundDir is the directory of CRIU's images of a round, from 1 on.
func RoundDir(n int) string { return fmt.Sprintf("%s/%d", imagesDir, n) }

// VolumeName is the entry of a volume, from 1 on.
func VolumeName(n int) string { return fmt.Sprintf("%s/%d.tar.zst", volumesDir, n) }

// namePattern is that of Docker for checkpoints.
var namePattern = pattern.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// CheckName checks a checkpoint's name.
func CheckName(name string) error {
	if !namePattern.MatchString(name) {
		return fault.New(fault.Invalid, "invalid checkpoint name %.128q: it has letters, digits, points, dashes and underscores, and begins with a letter or digit", name)
	}
	return nil
}

// ParseManifest reads a manifest strictly.
func ParseManifest(b []byte) (*Manifest, error) {
	if len(b) > maxManifest {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint: its manifest is too long")
	}
	m := new(Manifest)
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(m); err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint's manifest: %w", err)
	}
	if d.More() {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint's manifest: something follows it")
	}
	return m, m.check()
}

func (m *Manifest) check() error {
	bad := func(format string, a ...any) error {
		return fault.New(fault.Invalid, "cannot use the checkpoint: "+format, a...)
	}
	c := &m.Container
	switch {
	case m.Version < 1:
		return bad("its manifest has no version")
	case m.Version > Version:
		return fault.New(fault.Unsupported, "cannot use the checkpoint: it is of version %d, and this engine knows %d", m.Version, Version)
	case c.Config == nil || c.HostConfig == nil:
		return bad("its manifest describes no container")
	case len(c.ID) != 64 || strings.Trim(c.ID, "0123456789abcdef") != "":
		return bad("its container's id is none")
	case m.Cold != (m.Rounds == 0) || m.Rounds < 0 || m.Rounds > MaxRounds:
		return bad("it has %d rounds of images", m.Rounds)
	case len(m.Volumes) > maxVolumes || len(m.Binds) > maxBinds:
		return bad("it has too many volumes or mounts")
	case c.Image.ID != "" && digest.Digest(c.Image.ID).Validate() != nil:
		return bad("its image's id is none")
	case c.Image.Digest != "" && c.Image.Digest.Validate() != nil:
		return bad("its image's digest is none")
	}
	seen := map[string]bool{}
	for _, v := range m.Volumes {
		if !path.IsAbs(v.Target) || v.Target != path.Clean(v.Target) || seen[v.Target] || v.Name == "" {
			return bad("volume %.64q has no place of its own", v.Name)
		}
		seen[v.Target] = true
	}
	for _, b := range m.Binds {
		if !path.IsAbs(b) {
			return bad("mount %.64q has no place", b)
		}
	}
	for _, s := range m.Streams {
		if s != "" && !streamPattern.MatchString(s) {
			return bad("%.64q is no stream", s)
		}
	}
	for name, ep := range c.Endpoints {
		if ep == nil || name == "" {
			return bad("an endpoint has no settings")
		}
	}
	for name, ep := range c.Attached {
		if ep == nil || name == "" {
			return bad("an endpoint has no settings")
		}
	}
	return nil
}

var streamPattern = pattern.New(`^pipe:\[[0-9]{1,20}\]$`)

var partPattern = pattern.New(`^(criu/[1-9][0-9]?/[A-Za-z0-9][A-Za-z0-9._-]{0,127}|layer\.tar|image\.tar|volumes/[1-9][0-9]{0,2}\.tar\.zst)$`)

// partOf tells whether a name is one of the manifest's parts.
func (m *Manifest) partOf(name string) bool {
	if !partPattern.MatchString(name) {
		return false
	}
	var n int
	switch {
	case name == ImageName:
		return m.WithImage
	case strings.HasPrefix(name, imagesDir+"/"):
		_, err := fmt.Sscanf(name, imagesDir+"/%d/", &n)
		return err == nil && n <= m.Rounds && path.Base(name) != parentName
	case strings.HasPrefix(name, volumesDir+"/"):
		_, err := fmt.Sscanf(name, volumesDir+"/%d.", &n)
		return err == nil && n <= len(m.Volumes)
	}
	return true
}

// Part is a file of a checkpoint.
type Part struct {
	Name   string
	Size   int64
	SHA256 string
}

// seal is the last entry.
type seal struct {
	Version int
	Parts   []Part
}

func parseSeal(b []byte) (*seal, error) {
	s := new(seal)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint's seal: %w", err)
	}
	if s.Version < 1 || len(s.Parts) == 0 || len(s.Parts) > maxFiles {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint's seal: it seals %d files", len(s.Parts))
	}
	return s, nil
}
