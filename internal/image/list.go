package image

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// entry is one image as lists show it: a config with all that refers to it.
type entry struct {
	id      digest.Digest
	variant *variant
	targets []ocispec.Descriptor // distinct
	tags    []string             // familiar
	digests []string             // familiar, with @
	names   []string             // records, dangling ones too
	target  *target
	updated time.Time // when last tagged
}

// entries groups the records by image. A target of several platforms counts for
// the one that runs here.
func (s *Service) entries(ctx context.Context) ([]*entry, error) {
	byID := map[digest.Digest]*entry{}
	var order []*entry
	for _, r := range s.cat.all() {
		t, err := s.target(ctx, r.Target)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			s.log.Warn("skip an image that cannot be read", "image", r.Name, "cause", err)
			continue
		}
		v := t.best("")
		if v == nil {
			continue
		}
		e := byID[v.id]
		if e == nil {
			e = &entry{id: v.id, variant: v, target: t}
			byID[v.id] = e
			order = append(order, e)
		}
		e.add(r)
	}
	return order, nil
}

func (e *entry) add(r images.Image) {
	if !slices.ContainsFunc(e.targets, func(d ocispec.Descriptor) bool { return d.Digest == r.Target.Digest }) {
		e.targets = append(e.targets, r.Target)
	}
	e.names = append(e.names, r.Name)
	if r.UpdatedAt.After(e.updated) {
		e.updated = r.UpdatedAt
	}
	if isDangling(r.Name) {
		return
	}
	named, err := reference.ParseNormalizedNamed(r.Name)
	if err != nil {
		return
	}
	if _, ok := named.(reference.Digested); ok {
		e.digests = append(e.digests, reference.FamiliarString(named))
	} else {
		e.tags = append(e.tags, reference.FamiliarString(named))
	}
}

// entryOf finds the entry of an id.
func (s *Service) entryOf(ctx context.Context, id digest.Digest) (*entry, error) {
	es, err := s.entries(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		if e.id == id {
			return e, nil
		}
	}
	return nil, errNoImage(id.String())
}

// imageFilters are Docker's, checked.
type imageFilters struct {
	dangling      *bool
	before, since time.Time
	until         time.Time
	labels        []string
	notLabels     []string
	references    []string
}

func (s *Service) parseFilters(ctx context.Context, in map[string]map[string]bool, known ...string) (imageFilters, error) {
	var f imageFilters
	for key, values := range in {
		if !slices.Contains(known, key) {
			return f, fault.New(fault.Invalid, "invalid filter '%s'", key)
		}
		for v := range values {
			switch key {
			case "dangling":
				var b bool
				switch strings.ToLower(v) {
				case "1", "true", "t":
					b = true
				case "0", "false", "f":
				default:
					return f, fault.New(fault.Invalid, "invalid filter 'dangling=[%s]'", v)
				}
				if f.dangling != nil && *f.dangling != b {
					return f, fault.New(fault.Invalid, "invalid filter 'dangling=[true false]'")
				}
				f.dangling = &b
			case "label":
				f.labels = append(f.labels, v)
			case "label!":
				f.notLabels = append(f.notLabels, v)
			case "reference":
				f.references = append(f.references, v)
			case "before", "since":
				found, err := s.find(ctx, v)
				if err != nil {
					return f, err
				}
				img, err := s.pick(ctx, v, found, "")
				if err != nil {
					return f, err
				}
				if key == "before" && (f.before.IsZero() || img.created().Before(f.before)) {
					f.before = img.created()
				}
				if key == "since" && img.created().After(f.since) {
					f.since = img.created()
				}
			case "until":
				t, err := parseUntil(v, time.Now())
				if err != nil {
					return f, err
				}
				if f.until.IsZero() || t.Before(f.until) {
					f.until = t
				}
			}
		}
	}
	return f, nil
}

// parseUntil reads a duration before now, a unix time, or a date.
func parseUntil(v string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(v); err == nil {
		return now.Add(-d), nil
	}
	var sec, nsec int64
	if n, err := fmt.Sscanf(v, "%d.%d", &sec, &nsec); err == nil && n == 2 {
		return time.Unix(sec, nsec), nil
	}
	if n, err := fmt.Sscanf(v, "%d", &sec); err == nil && n == 1 && fmt.Sprint(sec) == v {
		return time.Unix(sec, 0), nil
	}
	for _, l := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(l, v, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fault.New(fault.Invalid, "cannot read the time %q: give a duration such as 24h, a unix time or a date", v)
}

func (f imageFilters) match(e *entry) bool {
	c := e.variant.created()
	if !f.before.IsZero() && !c.Before(f.before) || !f.since.IsZero() && !c.After(f.since) || !f.until.IsZero() && !c.Before(f.until) {
		return false
	}
	for _, l := range f.labels {
		if !hasLabel(e.variant.image.Config.Labels, l) {
			return false
		}
	}
	for _, l := range f.notLabels {
		if hasLabel(e.variant.image.Config.Labels, l) {
			return false
		}
	}
	if f.dangling != nil && *f.dangling != (len(e.tags) == 0) {
		return false
	}
	return true
}

func hasLabel(labels map[string]string, want string) bool {
	k, v, eq := strings.Cut(want, "=")
	got, ok := labels[k]
	return ok && (!eq || got == v)
}

// refersTo tells whether a familiar reference matches a pattern as Docker's
// reference filter reads them.
func refersTo(ref, pattern string) bool {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return false
	}
	if ok, err := reference.FamiliarMatch(pattern, named); err == nil && ok {
		return true
	}
	for _, s := range []string{reference.FamiliarName(named), named.Name(), named.String()} {
		if ok, err := path.Match(pattern, s); err == nil && ok {
			return true
		}
	}
	return false
}

// List lists images, newest first.
func (s *Service) List(ctx context.Context, filters map[string]map[string]bool, all, shared, manifests bool) ([]mimage.Summary, error) {
	f, err := s.parseFilters(ctx, filters, "dangling", "label", "label!", "before", "since", "reference", "until")
	if err != nil {
		return nil, err
	}
	for _, p := range f.references {
		if _, err := path.Match(p, ""); err != nil {
			return nil, fault.New(fault.Invalid, "cannot read the pattern %q: %w", p, err)
		}
	}
	es, err := s.entries(ctx)
	if err != nil {
		return nil, err
	}
	ctx = s.ctx(ctx)
	sizes := newLayerSizes(s)
	parents := map[digest.Digest]bool{}
	ids := map[digest.Digest]digest.Digest{}
	for _, e := range es {
		if ids[e.id] = s.parentOf(ctx, e); ids[e.id] != "" {
			parents[ids[e.id]] = true
		}
	}
	out := []mimage.Summary{}
	for _, e := range es {
		if !f.match(e) || len(e.tags)+len(e.digests) == 0 && parents[e.id] && !all {
			continue
		}
		tags, digests := e.tags, e.digests
		if len(f.references) > 0 {
			keep := func(r string) bool {
				return slices.ContainsFunc(f.references, func(p string) bool { return refersTo(r, p) })
			}
			tags = slices.DeleteFunc(slices.Clone(tags), func(r string) bool { return !keep(r) })
			digests = slices.DeleteFunc(slices.Clone(digests), func(r string) bool { return !keep(r) })
			if len(tags)+len(digests) == 0 {
				continue
			}
		}
		sum := mimage.Summary{
			ID:          e.id.String(),
			ParentID:    ids[e.id].String(),
			Created:     e.variant.created().Unix(),
			Labels:      e.variant.image.Config.Labels,
			RepoTags:    nonNil(tags),
			RepoDigests: nonNil(digests),
			Size:        s.sizeOf(ctx, e.variant, sizes),
			SharedSize:  -1,
			Containers:  -1,
			Descriptor:  &e.targets[0],
		}
		if e.variant.created().IsZero() {
			sum.Created = 0
		}
		if manifests {
			if sum.Manifests, err = s.manifestSummaries(ctx, e.target, sizes); err != nil {
				return nil, err
			}
		}
		out = append(out, sum)
	}
	if shared {
		s.fillShared(ctx, out, es, sizes)
	}
	slices.SortStableFunc(out, func(a, b mimage.Summary) int { return int(min(max(b.Created-a.Created, -1), 1)) })
	return out, nil
}

func nonNil(l []string) []string {
	if l == nil {
		return []string{}
	}
	return l
}

// layerSizes remembers what layers take, for one list.
type layerSizes struct {
	s *Service
	m map[string]layerSize
}

type layerSize struct {
	size   int64
	parent string
	ok     bool
}

func newLayerSizes(s *Service) *layerSizes { return &layerSizes{s, map[string]layerSize{}} }

func (l *layerSizes) get(ctx context.Context, name string) layerSize {
	if z, ok := l.m[name]; ok {
		return z
	}
	n, parent, err := l.s.layerSize(ctx, name)
	z := layerSize{n, parent, err == nil}
	l.m[name] = z
	return z
}

// sizeOf is the unpacked size of an image, or of its blobs if it is not unpacked.
func (s *Service) sizeOf(ctx context.Context, v *variant, sizes *layerSizes) int64 {
	var sum int64
	for name := v.chainID().String(); name != ""; {
		z := sizes.get(ctx, name)
		if !z.ok {
			return v.size
		}
		sum += z.size
		name = z.parent
	}
	return sum
}

// fillShared sets what each image shares with others.
func (s *Service) fillShared(ctx context.Context, out []mimage.Summary, es []*entry, sizes *layerSizes) {
	uses := map[string]int{}
	chains := map[string][]string{}
	for _, e := range es {
		for name := e.variant.chainID().String(); name != ""; {
			z := sizes.get(ctx, name)
			if !z.ok {
				break
			}
			uses[name]++
			chains[e.id.String()] = append(chains[e.id.String()], name)
			name = z.parent
		}
	}
	for i := range out {
		out[i].SharedSize = 0
		for _, c := range chains[out[i].ID] {
			if uses[c] > 1 {
				out[i].SharedSize += sizes.get(ctx, c).size
			}
		}
	}
}

// manifestSummaries describes every manifest of a target.
func (s *Service) manifestSummaries(ctx context.Context, t *target, sizes *layerSizes) ([]mimage.ManifestSummary, error) {
	children := t.children
	if len(children) == 0 {
		children = []ocispec.Descriptor{t.desc}
	}
	out := []mimage.ManifestSummary{}
	for _, d := range children {
		m := mimage.ManifestSummary{ID: d.Digest.String(), Descriptor: d, Kind: mimage.ManifestKindUnknown}
		_, err := s.content.Info(ctx, d.Digest)
		m.Available = err == nil
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, asFault(err)
		}
		if isAttestation(d) {
			m.Kind = mimage.ManifestKindAttestation
			m.AttestationData = &mimage.AttestationProperties{For: digest.Digest(d.Annotations[attestedDigest])}
			m.Size.Content, m.Size.Total = d.Size, d.Size
		}
		for i := range t.variants {
			v := &t.variants[i]
			if v.manifest.Digest != d.Digest {
				continue
			}
			m.Kind = mimage.ManifestKindImage
			m.ImageData = &mimage.ImageProperties{Platform: v.platform, Containers: []string{}}
			m.Size.Content = v.size
			var unpacked int64
			for name := v.chainID().String(); name != ""; {
				z := sizes.get(ctx, name)
				if !z.ok {
					break
				}
				unpacked += z.size
				name = z.parent
			}
			m.ImageData.Size.Unpacked = unpacked
			m.Size.Total = v.size + unpacked
			m.Available = s.available(ctx, v)
		}
		if m.Kind == mimage.ManifestKindUnknown && d.Platform != nil {
			m.Kind = mimage.ManifestKindImage
			m.ImageData = &mimage.ImageProperties{Platform: *d.Platform, Containers: []string{}}
		}
		out = append(out, m)
	}
	return out, nil
}

func (s *Service) available(ctx context.Context, v *variant) bool {
	for _, l := range v.layers {
		if _, err := s.content.Info(ctx, l.Digest); err != nil {
			return false
		}
	}
	return true
}

// Usage is the bytes that all unpacked layers take together.
func (s *Service) Usage(ctx context.Context) (int64, error) {
	es, err := s.entries(ctx)
	if err != nil {
		return 0, err
	}
	ctx = s.ctx(ctx)
	sizes := newLayerSizes(s)
	seen := map[string]bool{}
	var sum int64
	for _, e := range es {
		t := e.target
		for i := range t.variants {
			for name := t.variants[i].chainID().String(); name != "" && !seen[name]; {
				z := sizes.get(ctx, name)
				if !z.ok {
					break
				}
				seen[name] = true
				sum += z.size
				name = z.parent
			}
		}
	}
	return sum, nil
}

const parentLabel = "io.servin.parent"

// parentOf is the image that this one was committed from, if it is still here.
func (s *Service) parentOf(ctx context.Context, e *entry) digest.Digest {
	info, err := s.content.Info(ctx, e.id)
	if err != nil {
		return ""
	}
	p := digest.Digest(info.Labels[parentLabel])
	if p == "" || p.Validate() != nil {
		return ""
	}
	return p
}
