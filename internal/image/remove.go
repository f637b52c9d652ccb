package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/distribution/reference"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Tag gives an image another name.
func (s *Service) Tag(ctx context.Context, ref, target string) error {
	named, err := reference.ParseNormalizedNamed(target)
	if err != nil {
		return errBadRef(target, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return fault.New(fault.Invalid, "refusing to create a tag with a digest reference")
	}
	s.mutate.Lock() // from here to the record: what is found must not be collected meanwhile
	defer s.mutate.Unlock()
	f, err := s.find(ctx, ref)
	if err != nil {
		return err
	}
	v, err := s.pick(ctx, ref, f, "")
	if err != nil {
		return err
	}
	desc := f.target
	if f.variant != nil && f.variant.manifest.Digest != f.target.Digest {
		if t, err := s.target(ctx, f.target); err == nil && t.best("") != f.variant {
			desc = f.variant.manifest // an id of another platform's image
		}
	}
	if err := s.referLocked(s.ctx(ctx), desc, nil, s.recordName(named)); err != nil {
		return err
	}
	s.emit("tag", v.id, reference.FamiliarString(reference.TagNameOnly(named)))
	return nil
}

// Why an image may not go; a hard reason cannot be forced.
type reason struct {
	hard, used bool
	id         digest.Digest
	text       string
}

func (c *reason) err() error {
	how := "must be forced"
	if c.hard {
		how = "cannot be forced"
	}
	return fault.New(fault.Conflict, "conflict: unable to delete %s (%s) - %s", short(c.id), how, c.text)
}

// removal is one Remove.
type removal struct {
	s       *Service
	o       RemoveOptions
	records []mimage.DeleteResponse
}

// Remove untags or deletes, as docker rmi does.
func (s *Service) Remove(ctx context.Context, ref string, o RemoveOptions) ([]mimage.DeleteResponse, error) {
	r := &removal{s: s, o: o}
	if err := r.locked(ctx, ref); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(r.records, func(d mimage.DeleteResponse) bool { return d.Deleted != "" }) {
		// The space is free when the caller reads that the image is deleted.
		if err := s.Collect(ctx); err != nil {
			s.log.Warn("cannot collect a removed image's content", "cause", err)
			s.markDirty()
		}
	}
	return r.records, nil
}

func (r *removal) locked(ctx context.Context, ref string) error {
	r.s.mutate.Lock()
	defer r.s.mutate.Unlock()
	f, err := r.s.find(ctx, ref) // under the lock: another caller may just remove it
	if err != nil {
		return err
	}
	e, err := r.s.entryFor(ctx, ref, f)
	if err != nil {
		return err
	}
	if err := r.run(r.s.ctx(ctx), ref, f, e); err != nil {
		if len(r.records) > 0 {
			r.s.markDirty()
		}
		return err
	}
	return nil
}

func (s *Service) entryFor(ctx context.Context, ref string, f found) (*entry, error) {
	es, err := s.entries(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		if f.name != "" && slices.Contains(e.names, f.name) || f.name == "" && (e.id == f.id || slices.ContainsFunc(e.targets, func(d ocispec.Descriptor) bool { return d.Digest == f.target.Digest })) {
			return e, nil
		}
	}
	if f.name != "" {
		// Its content cannot be read; it can still be untagged.
		if r, ok := s.cat.get(f.name); ok {
			e := &entry{id: r.Target.Digest}
			e.add(r)
			return e, nil
		}
	}
	return nil, errNoImage(ref)
}

// refs are the records of an entry that are references.
func refs(e *entry) []string {
	return slices.DeleteFunc(slices.Clone(e.names), isDangling)
}

func isDigestRef(name string) bool { return strings.Contains(name, "@") }

func repoOf(name string) string {
	if n, err := reference.ParseNormalizedNamed(name); err == nil {
		return n.Name()
	}
	return name
}

// single tells whether all references are one tag and digests of its repository.
func single(names []string) bool {
	if len(names) <= 1 {
		return true
	}
	var tag string
	repos := map[string]bool{}
	for _, n := range names {
		switch {
		case isDigestRef(n):
			repos[repoOf(n)] = true
		case tag == "":
			tag = n
		default:
			return false
		}
	}
	if tag == "" {
		tag = names[0]
	}
	return len(repos) == 1 && repos[repoOf(tag)]
}

func (r *removal) run(ctx context.Context, ref string, f found, e *entry) error {
	byName := f.name != ""
	all := refs(e)
	if !byName {
		if single(all) {
			if c := r.conflict(ctx, e, !r.o.Force, false); c != nil {
				return c.err()
			}
			for _, n := range all {
				if err := r.untag(ctx, e, n); err != nil {
					return err
				}
			}
		}
		return r.delete(ctx, e, r.o.Force, !r.o.NoPrune, false)
	}
	if !r.o.Force && single(all) {
		if c := r.user(e, func(bool) bool { return true }); c != "" {
			return fault.New(fault.Conflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", ref, shortID(c), short(e.id))
		}
	}
	if err := r.untag(ctx, e, f.name); err != nil {
		return err
	}
	// With its last tag, a repository's digests go too.
	if !isDigestRef(f.name) {
		repo := repoOf(f.name)
		left := refs(e)
		if !slices.ContainsFunc(left, func(n string) bool { return !isDigestRef(n) && repoOf(n) == repo }) {
			for _, n := range left {
				if isDigestRef(n) && repoOf(n) == repo {
					if err := r.untag(ctx, e, n); err != nil {
						return err
					}
				}
			}
		}
	}
	if len(refs(e)) > 0 {
		return nil
	}
	return r.delete(ctx, e, r.o.Force, !r.o.NoPrune, true)
}

func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// untag drops one reference. The last one leaves an untagged record, so that
// nothing is lost if the deletion that follows does not happen.
func (r *removal) untag(ctx context.Context, e *entry, name string) error {
	rec, ok := r.s.cat.get(name)
	if !ok {
		return nil
	}
	others := 0
	for _, n := range e.names {
		if o, ok := r.s.cat.get(n); ok && n != name && o.Target.Digest == rec.Target.Digest {
			others++
		}
	}
	if others == 0 {
		d := danglingName + rec.Target.Digest.String()
		if err := r.s.setRecord(ctx, d, rec.Target, nil); err != nil {
			return err
		}
		e.names = append(e.names, d)
	}
	if err := r.s.dropRecord(ctx, name); err != nil {
		return err
	}
	e.names = slices.DeleteFunc(e.names, func(n string) bool { return n == name })
	r.records = append(r.records, mimage.DeleteResponse{Untagged: familiar(name)})
	r.s.emit("untag", e.id, familiar(name))
	return nil
}

// user names a container that uses the image and is as wanted.
func (r *removal) user(e *entry, wanted func(running bool) bool) string {
	if r.o.InUse == nil {
		return ""
	}
	var ids []string
	seen := map[digest.Digest]bool{e.id: true}
	look := []digest.Digest{e.id}
	if e.target != nil {
		for i := range e.target.variants {
			if id := e.target.variants[i].id; !seen[id] {
				seen[id] = true
				look = append(look, id)
			}
		}
	}
	for _, id := range look {
		for c, running := range r.o.InUse(id) {
			if wanted(running) {
				ids = append(ids, c)
			}
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return slices.Min(ids)
}

// conflict tells why the image may not be deleted; soft asks for what force
// overrides too, refs for more than one reference among that.
func (r *removal) conflict(ctx context.Context, e *entry, soft, refsToo bool) *reason {
	if r.hasChildren(ctx, e) {
		return &reason{hard: true, id: e.id, text: "image has dependent child images"}
	}
	if c := r.user(e, func(running bool) bool { return running }); c != "" {
		return &reason{hard: true, used: true, id: e.id, text: "image is being used by running container " + shortID(c)}
	}
	if !soft {
		return nil
	}
	if refsToo && len(refs(e)) > 1 {
		return &reason{id: e.id, text: "image is referenced in multiple repositories"}
	}
	if c := r.user(e, func(running bool) bool { return !running }); c != "" {
		return &reason{used: true, id: e.id, text: "image is being used by stopped container " + shortID(c)}
	}
	return nil
}

func (r *removal) hasChildren(ctx context.Context, e *entry) bool {
	es, err := r.s.entries(ctx)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(es, func(x *entry) bool { return x.id != e.id && r.s.parentOf(ctx, x) == e.id })
}

// delete removes the image and, if asked, untagged images that it came from.
// Quiet is after an untag, when a container's use is no error.
func (r *removal) delete(ctx context.Context, e *entry, force, prune, quiet bool) error {
	if c := r.conflict(ctx, e, !force, true); c != nil {
		if quiet && (len(refs(e)) > 0 || c.used || c.hard) {
			return nil
		}
		return c.err()
	}
	var parent digest.Digest
	if e.variant != nil {
		parent = r.s.parentOf(ctx, e)
	}
	for _, n := range slices.Clone(e.names) {
		if isDangling(n) {
			continue
		}
		if err := r.untag(ctx, e, n); err != nil {
			return err
		}
	}
	gone := r.layersOnlyOf(ctx, e)
	for _, n := range e.names {
		if err := r.s.dropRecord(ctx, n); err != nil {
			return err
		}
	}
	r.records = append(r.records, mimage.DeleteResponse{Deleted: e.id.String()})
	for _, l := range gone {
		r.records = append(r.records, mimage.DeleteResponse{Deleted: l})
	}
	r.s.emit("delete", e.id, "")
	if !prune || parent == "" {
		return nil
	}
	p, err := r.s.entryOf(ctx, parent)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(refs(p)) > 0 {
		return nil
	}
	return r.delete(ctx, p, false, true, true)
}

// layersOnlyOf names the chains that no other image has, topmost first.
func (r *removal) layersOnlyOf(ctx context.Context, e *entry) []string {
	if e.variant == nil {
		return nil
	}
	es, err := r.s.entries(ctx)
	if err != nil {
		return nil
	}
	kept := map[string]bool{}
	for _, x := range es {
		if x.id == e.id {
			continue
		}
		for i := range x.target.variants {
			for _, l := range stack(x.target.variants[i].layers, x.target.variants[i].diffIDs) {
				kept[l.chain.String()] = true
			}
		}
	}
	if r.s.cfg.PinnedChains != nil {
		for c := range r.s.cfg.PinnedChains() {
			for name := c; name != "" && !kept[name]; {
				kept[name] = true
				info, err := r.s.snaps.Stat(ctx, name)
				if err != nil {
					break
				}
				name = info.Parent
			}
		}
	}
	var out []string
	for _, l := range slices.Backward(stack(e.variant.layers, e.variant.diffIDs)) {
		if !kept[l.chain.String()] {
			out = append(out, l.chain.String())
		}
	}
	return out
}

// Prune deletes untagged images, or with dangling=false all unused ones.
func (s *Service) Prune(ctx context.Context, filters map[string]map[string]bool, inUse func(digest.Digest) map[string]bool) (mimage.PruneReport, error) {
	rep := mimage.PruneReport{ImagesDeleted: []mimage.DeleteResponse{}}
	f, err := s.parseFilters(ctx, filters, "dangling", "label", "label!", "until")
	if err != nil {
		return rep, err
	}
	onlyDangling := f.dangling == nil || *f.dangling
	f.dangling = nil
	before, err := s.stored(ctx)
	if err != nil {
		return rep, err
	}
	es, err := s.entries(ctx)
	if err != nil {
		return rep, err
	}
	for _, e := range es {
		if err := ctx.Err(); err != nil {
			return rep, err
		}
		if onlyDangling && len(refs(e)) > 0 || !f.match(e) {
			continue
		}
		if s.isEmbedded(e) {
			continue // the engine would load it again
		}
		recs, err := s.pruneOne(ctx, e, inUse)
		rep.ImagesDeleted = append(rep.ImagesDeleted, recs...)
		if err != nil {
			return rep, err
		}
	}
	if err := s.Collect(ctx); err != nil {
		return rep, err
	}
	after, err := s.stored(ctx)
	if err != nil {
		return rep, err
	}
	rep.SpaceReclaimed = uint64(max(before-after, 0))
	if len(rep.ImagesDeleted) > 0 {
		s.emit("prune", "", "")
	}
	return rep, nil
}

func (s *Service) isEmbedded(e *entry) bool {
	return slices.ContainsFunc(e.names, func(n string) bool {
		r, ok := s.cat.get(n)
		return ok && r.Labels[embeddedLabel] != ""
	})
}

func (s *Service) pruneOne(ctx context.Context, e *entry, inUse func(digest.Digest) map[string]bool) ([]mimage.DeleteResponse, error) {
	s.mutate.Lock()
	defer s.mutate.Unlock()
	now, err := s.entryOf(ctx, e.id)
	if fault.Is(err, fault.NotFound) || err == nil && !slices.Equal(now.names, e.names) {
		return nil, nil // changed meanwhile
	}
	if err != nil {
		return nil, err
	}
	r := &removal{s: s, o: RemoveOptions{InUse: inUse}}
	ctx = s.ctx(ctx)
	if r.user(now, func(bool) bool { return true }) != "" || r.hasChildren(ctx, now) {
		return nil, nil
	}
	for _, n := range refs(now) {
		if err := r.untag(ctx, now, n); err != nil {
			return r.records, err
		}
	}
	err = r.delete(ctx, now, false, true, true)
	return r.records, err
}

// stored is the bytes of all blobs and unpacked layers.
func (s *Service) stored(ctx context.Context) (int64, error) {
	var sum int64
	ctx = s.ctx(ctx)
	err := s.content.Walk(ctx, func(i content.Info) error {
		sum += i.Size
		return ctx.Err()
	})
	if err != nil {
		return 0, asFault(fmt.Errorf("cannot measure the image store: %w", err))
	}
	seen := map[string]bool{} // a layer may have two names
	err = s.snaps.Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		if dir := i.Labels[upperLabel]; i.Kind != snapshots.KindCommitted || dir != "" && seen[dir] {
			return nil
		} else {
			seen[dir] = true
		}
		n, _, err := s.layerSize(ctx, i.Name)
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		sum += n
		return errors.Join(err, ctx.Err())
	})
	if err != nil {
		return 0, asFault(fmt.Errorf("cannot measure the layers: %w", err))
	}
	return sum, nil
}
