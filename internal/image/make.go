package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Import makes an image of one layer from a root file system's tar.
func (s *Service) Import(ctx context.Context, r io.Reader, ref, message, platform string, changes []string) (digest.Digest, error) {
	name, err := s.newName(ref)
	if err != nil {
		return "", err
	}
	p := platforms.DefaultSpec()
	if platform != "" {
		if p, err = platforms.Parse(platform); err != nil {
			return "", fault.New(fault.Invalid, "cannot read platform %q: %w", platform, err)
		}
	}
	now := time.Now().UTC()
	img := dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &now, Platform: ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}}
	if err := applyChanges(&img.Config, changes); err != nil {
		return "", err
	}
	if message == "" {
		message = "Imported from -"
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	plain, stop, err := decompressAny(ctx, r)
	if errors.Is(err, errEmptyStream) {
		plain, stop, err = bytes.NewReader(make([]byte, 1024)), func() {}, nil // no file at all
	}
	if err != nil {
		return "", err
	}
	defer stop()
	layer, err := s.putStream(ctx, plain, nil, s.cfg.Limits.Bytes)
	if err != nil {
		return "", err
	}
	layer.MediaType = ocispec.MediaTypeImageLayer
	img.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}}
	img.History = []ocispec.History{{Created: &now, Comment: message}}
	id, err := s.record(ctx, img, []ocispec.Descriptor{layer}, "", name)
	if err != nil {
		return "", err
	}
	s.emit("import", id, familiarOrID(name, id))
	return id, nil
}

// Commit makes an image of a parent's layers and a new one.
func (s *Service) Commit(ctx context.Context, req CommitRequest, r io.Reader) (digest.Digest, error) {
	name, err := s.newName(req.Ref)
	if err != nil {
		return "", err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	created := req.Created
	if created.IsZero() {
		created = time.Now()
	}
	created = created.UTC()
	p := platforms.DefaultSpec()
	img := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}}
	var layers []ocispec.Descriptor
	if req.Parent.ID != "" {
		parent, err := s.readVariant(ctx, req.Parent.Manifest)
		if err != nil {
			return "", asFault(fmt.Errorf("cannot read the parent image: %w", err))
		}
		img.Platform = parent.image.Platform
		img.History = parent.image.History
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, parent.diffIDs...)
		layers = append(layers, parent.layers...)
	}
	img.Created, img.Author = &created, req.Author
	img.Config.ImageConfig = req.Config
	img.Config.Shell, img.Config.OnBuild = req.Shell, req.OnBuild
	if h := req.Health; h != nil {
		img.Config.Healthcheck = &dockerspec.HealthcheckConfig{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries}
	}
	layer, err := s.putStream(ctx, r, nil, s.cfg.Limits.Bytes)
	if err != nil {
		return "", err
	}
	layer.MediaType = ocispec.MediaTypeImageLayer
	img.RootFS.Type = "layers"
	img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, layer.Digest)
	img.History = append(img.History, ocispec.History{Created: &created, CreatedBy: req.CreatedBy, Author: req.Author, Comment: req.Comment})
	return s.record(ctx, img, append(layers, layer), req.Parent.ID, name)
}

// newName checks the reference of an image to be made; "" is none.
func (s *Service) newName(ref string) (string, error) {
	if ref == "" {
		return "", nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", errBadRef(ref, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fault.New(fault.Invalid, "cannot name the new image %q: a digest is not for choosing", ref)
	}
	return s.recordName(named), nil
}

func familiarOrID(name string, id digest.Digest) string {
	if name == "" {
		return id.String()
	}
	return familiar(name)
}

// record stores an image made here, unpacked, under a name or untagged.
func (s *Service) record(ctx context.Context, img dockerspec.DockerOCIImage, layers []ocispec.Descriptor, parent digest.Digest, name string) (digest.Digest, error) {
	b, err := json.Marshal(img)
	if err != nil {
		return "", fmt.Errorf("cannot encode the image's config: %w", err)
	}
	desc, v, err := s.makeImage(ctx, b, layers)
	if err != nil {
		return "", err
	}
	if err := s.settle(ctx, v, nil); err != nil {
		return "", err
	}
	if parent != "" {
		if err := s.label(ctx, v.id, map[string]string{parentLabel: parent.String()}); err != nil {
			return "", err
		}
	}
	names := []string{name}
	if name == "" {
		names = nil
		if !s.referredTo(desc.Digest) {
			names = []string{danglingName + desc.Digest.String()}
		}
	}
	return v.id, s.refer(ctx, desc, nil, names...)
}

// applyChanges applies Dockerfile instructions to a config, those that commit
// and import allow.
func applyChanges(c *dockerspec.DockerOCIImageConfig, changes []string) error {
	for _, line := range changes {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSpace(rest)
		if err := applyChange(c, strings.ToUpper(word), rest); err != nil {
			return fault.New(fault.Invalid, "cannot apply change %q: %w", line, err)
		}
	}
	return nil
}

func applyChange(c *dockerspec.DockerOCIImageConfig, word, rest string) error {
	if rest == "" && word != "CMD" && word != "ENTRYPOINT" {
		return fmt.Errorf("%s requires an argument", word)
	}
	rest = ExpandFor(word, rest, c.Env)
	switch word {
	case "CMD":
		c.Cmd = execForm(rest, c.Shell)
	case "ENTRYPOINT":
		c.Entrypoint = execForm(rest, c.Shell)
	case "ENV":
		kvs, err := keyValues(rest)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			c.Env = setEnv(c.Env, kv[0], kv[1])
		}
	case "LABEL":
		kvs, err := keyValues(rest)
		if err != nil {
			return err
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, kv := range kvs {
			c.Labels[kv[0]] = kv[1]
		}
	case "EXPOSE":
		if c.ExposedPorts == nil {
			c.ExposedPorts = map[string]struct{}{}
		}
		for _, p := range strings.Fields(rest) {
			if !strings.Contains(p, "/") {
				p += "/tcp"
			}
			c.ExposedPorts[p] = struct{}{}
		}
	case "VOLUME":
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		var vols []string
		if json.Unmarshal([]byte(rest), &vols) != nil {
			vols = strings.Fields(rest)
		}
		for _, v := range vols {
			c.Volumes[v] = struct{}{}
		}
	case "USER":
		c.User = rest
	case "WORKDIR":
		c.WorkingDir = rest
	case "STOPSIGNAL":
		c.StopSignal = rest
	case "ONBUILD":
		c.OnBuild = append(c.OnBuild, rest)
	case "SHELL":
		if err := json.Unmarshal([]byte(rest), &c.Shell); err != nil {
			return fmt.Errorf("SHELL requires the arguments to be in JSON form")
		}
	case "HEALTHCHECK":
		return applyHealth(c, rest)
	default:
		return fmt.Errorf("%s is not a valid change command", word)
	}
	return nil
}

func applyHealth(c *dockerspec.DockerOCIImageConfig, rest string) error {
	h := &dockerspec.HealthcheckConfig{}
	for strings.HasPrefix(rest, "--") {
		var flag string
		flag, rest, _ = strings.Cut(rest, " ")
		rest = strings.TrimSpace(rest)
		name, val, _ := strings.Cut(strings.TrimPrefix(flag, "--"), "=")
		if name == "retries" {
			if _, err := fmt.Sscan(val, &h.Retries); err != nil || h.Retries < 0 {
				return fmt.Errorf("--retries must be a number")
			}
			continue
		}
		d, err := time.ParseDuration(val)
		if err != nil {
			return err
		}
		switch name {
		case "interval":
			h.Interval = d
		case "timeout":
			h.Timeout = d
		case "start-period":
			h.StartPeriod = d
		case "start-interval":
			h.StartInterval = d
		default:
			return fmt.Errorf("unknown flag --%s", name)
		}
	}
	word, arg, _ := strings.Cut(rest, " ")
	switch strings.ToUpper(word) {
	case "NONE":
		h.Test = []string{"NONE"}
	case "CMD":
		var argv []string
		if json.Unmarshal([]byte(arg), &argv) == nil {
			h.Test = append([]string{"CMD"}, argv...)
		} else {
			h.Test = []string{"CMD-SHELL", strings.TrimSpace(arg)}
		}
	default:
		return fmt.Errorf("unknown type %q", word)
	}
	c.Healthcheck = h
	return nil
}

// execForm reads a JSON list, or wraps a line in the shell.
func execForm(rest string, shell []string) []string {
	var argv []string
	if strings.HasPrefix(rest, "[") && json.Unmarshal([]byte(rest), &argv) == nil {
		return argv
	}
	if rest == "" {
		return nil
	}
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(append([]string{}, shell...), rest)
}

func setEnv(env []string, k, v string) []string {
	for i, e := range env {
		if name, _, _ := strings.Cut(e, "="); name == k {
			env[i] = k + "=" + v
			return env
		}
	}
	return append(env, k+"="+v)
}

// keyValues reads `K=V K2="V 2"` or the old form `K V`.
func keyValues(s string) ([][2]string, error) {
	words, err := splitQuoted(s)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(words[0], "=") {
		k, v, ok := strings.Cut(s, " ")
		if !ok {
			return nil, fmt.Errorf("%q must have two arguments", s)
		}
		return [][2]string{{k, strings.TrimSpace(v)}}, nil
	}
	var out [][2]string
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("cannot find = in %q, it must be of the form name=value", w)
		}
		out = append(out, [2]string{k, v})
	}
	return out, nil
}

// splitQuoted splits at blanks outside quotes, which it removes.
func splitQuoted(s string) ([]string, error) {
	var out []string
	var b strings.Builder
	var quote byte
	in := false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
			in = true
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, in = c, true
		case quote == 0 && (c == ' ' || c == '\t'):
			if in {
				out = append(out, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteByte(c)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote is not closed in %q", s)
	}
	if in {
		out = append(out, b.String())
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%q is empty", s)
	}
	return out, nil
}
