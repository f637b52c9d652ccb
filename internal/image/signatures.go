package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Signatures lie beside an image in its repository: cosign's under tags made of the
// digest, newer ones as referrers of it (OCI distribution 1.1), or under the tag that
// stands for those where the registry does not know them.
const (
	bundleType        = "application/vnd.dev.sigstore.bundle"
	cosignSigType     = "application/vnd.dev.cosign.artifact.sig.v1+json"
	maxSignature      = 16 << 20
	maxSignatureItems = 200
	maxSignatureBytes = 128 << 20
	maxSignatureRepos = 4
)

// Signatures fetches what registries hold in signatures of an image, without a look
// at whether they are good. An image that is here is looked for where it came from,
// and its digests are those of what is here; another is asked about by name.
func (s *Service) Signatures(ctx context.Context, ref string, auth *registry.AuthConfig) (api.Signatures, error) {
	out := api.Signatures{Image: ref}
	var repos []reference.Named
	f, err := s.find(ctx, ref)
	switch {
	case err == nil:
		v, err := s.pick(ctx, ref, f, "")
		if err != nil {
			return out, err
		}
		out.Digests = []string{f.target.Digest.String()}
		if d := v.manifest.Digest.String(); d != out.Digests[0] {
			out.Digests = append(out.Digests, d)
		}
		repos = s.homes(ref, f)
	case fault.Is(err, fault.NotFound):
		named, perr := reference.ParseNormalizedNamed(ref)
		if perr != nil {
			return out, errBadRef(ref, perr)
		}
		named = reference.TagNameOnly(named)
		_, desc, rerr := s.resolver(auth, nil).Resolve(s.ctx(ctx), resolvable(named))
		if rerr != nil {
			return out, s.pullFault(named, auth, rerr)
		}
		out.Digests = []string{desc.Digest.String()}
		repos = []reference.Named{reference.TrimNamed(named)}
	default:
		return out, err
	}
	out.Items, err = s.SignaturesOf(ctx, repos, out.Digests, auth)
	return out, err
}

// SignaturesFor is Signatures for one manifest of an image that is here, which a
// container would run. A signature of the index that it belongs to is one of it.
func (s *Service) SignaturesFor(ctx context.Context, ref string, manifest digest.Digest) (api.Signatures, error) {
	out := api.Signatures{Image: ref, Digests: []string{manifest.String()}}
	f, err := s.find(ctx, ref)
	if err != nil {
		return out, err
	}
	if f.target.Digest != manifest {
		t, err := s.target(ctx, f.target)
		if err != nil {
			return out, asFault(fmt.Errorf("cannot read image %s: %w", ref, err))
		}
		if !slices.ContainsFunc(t.children, func(d ocispec.Descriptor) bool { return d.Digest == manifest }) {
			return out, fault.New(fault.Conflict, "%s is another image by now", ref)
		}
		out.Digests = append(out.Digests, f.target.Digest.String())
	}
	out.Items, err = s.SignaturesOf(ctx, s.homes(ref, f), out.Digests, nil)
	return out, err
}

// homes are the repositories that an image may have come from, the one it was asked
// by first.
func (s *Service) homes(ref string, f found) []reference.Named {
	var out []reference.Named
	add := func(name string) {
		n, err := reference.ParseNormalizedNamed(name)
		if err != nil || isDangling(name) {
			return
		}
		n = reference.TrimNamed(n)
		if len(out) < maxSignatureRepos && !slices.ContainsFunc(out, func(o reference.Named) bool { return o.Name() == n.Name() }) {
			out = append(out, n)
		}
	}
	if f.name != "" {
		add(f.name)
	} else if f.id == "" {
		add(ref)
	}
	for _, r := range s.cat.all() {
		if r.Target.Digest == f.target.Digest {
			add(r.Name)
		}
	}
	return out
}

// SignaturesOf fetches the signatures of digests from repositories. A repository that
// holds none is no error; one that cannot be asked is, unless another has some.
func (s *Service) SignaturesOf(ctx context.Context, repos []reference.Named, digests []string, auth *registry.AuthConfig) ([]api.SignatureItem, error) {
	h := harvest{s: s, seen: map[string]bool{}}
	var errs []error
	for _, repo := range repos {
		if err := h.repository(s.ctx(ctx), repo, digests, auth); err != nil {
			errs = append(errs, fault.As(fault.Of(asFault(err)), fmt.Errorf("cannot fetch the signatures in %s: %w", reference.FamiliarName(repo), err)))
		}
	}
	if len(h.items) > 0 {
		return h.items, nil
	}
	return nil, errors.Join(errs...)
}

// harvest collects signatures within bounds.
type harvest struct {
	s     *Service
	items []api.SignatureItem
	bytes int64
	seen  map[string]bool
}

func (h *harvest) repository(ctx context.Context, repo reference.Named, digests []string, auth *registry.AuthConfig) error {
	res := h.s.resolver(auth, nil)
	fetcher, err := res.Fetcher(ctx, repo.Name())
	if err != nil {
		return err
	}
	for _, d := range digests {
		dg, err := digest.Parse(d)
		if err != nil {
			return fault.New(fault.Invalid, "cannot look for signatures of %q: %w", d, err)
		}
		base := dg.Algorithm().String() + "-" + dg.Encoded()
		for _, suffix := range []string{".sig", ".att"} {
			desc, err := tagged(ctx, res, repo, base+suffix)
			if err != nil {
				return err
			}
			if desc == nil {
				continue
			}
			if err := h.manifest(ctx, fetcher, *desc, "tag "+base+suffix); err != nil {
				return err
			}
		}
		rf, ok := fetcher.(remotes.ReferrersFetcher)
		if !ok {
			continue
		}
		// By the API, or by the tag that stands in for it.
		list, err := rf.FetchReferrers(ctx, dg)
		if err != nil && !absent(err) {
			return err
		}
		for _, r := range list[:min(len(list), maxSignatureItems)] {
			if !strings.HasPrefix(r.ArtifactType, bundleType) && r.ArtifactType != cosignSigType {
				continue
			}
			if err := h.manifest(ctx, fetcher, r, "referrer "+r.Digest.String()); err != nil {
				return err
			}
		}
	}
	return nil
}

// tagged resolves a tag; nil where there is none.
func tagged(ctx context.Context, res remotes.Resolver, repo reference.Named, tag string) (*ocispec.Descriptor, error) {
	named, err := reference.WithTag(repo, tag)
	if err != nil {
		return nil, err
	}
	_, desc, err := res.Resolve(ctx, named.String())
	if absent(err) {
		return nil, nil
	}
	return &desc, err
}

// absent tells whether a registry says that there is no such thing. Registries that
// hide what they do not have answer that the caller may not.
func absent(err error) bool {
	var st remoteerrors.ErrUnexpectedStatus
	return errdefs.IsNotFound(err) || errors.As(err, &st) && (st.StatusCode == http.StatusNotFound || st.StatusCode == http.StatusBadRequest)
}

// manifest takes the layers of a manifest.
func (h *harvest) manifest(ctx context.Context, f remotes.Fetcher, desc ocispec.Descriptor, where string) error {
	if h.seen[desc.Digest.String()] {
		return nil
	}
	h.seen[desc.Digest.String()] = true
	b, err := h.blob(ctx, f, desc, maxManifest)
	if err != nil {
		return err
	}
	m, err := parseManifest(b)
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if len(h.items) >= maxSignatureItems {
			return nil
		}
		data, err := h.blob(ctx, f, l, maxSignature)
		if err != nil {
			return err
		}
		h.items = append(h.items, api.SignatureItem{Found: where, MediaType: l.MediaType, Annotations: l.Annotations, Data: data})
	}
	return nil
}

// blob fetches something small and proves it.
func (h *harvest) blob(ctx context.Context, f remotes.Fetcher, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	if desc.Size > limit || h.bytes+desc.Size > maxSignatureBytes {
		return nil, fault.New(fault.Invalid, "%s of %d bytes is larger than what is read of signatures", desc.Digest, desc.Size)
	}
	rc, err := f.Fetch(ctx, bare(desc))
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err != nil {
		return nil, err
	}
	h.bytes += int64(len(b))
	if desc.Digest.Algorithm().FromBytes(b) != desc.Digest {
		return nil, fault.New(fault.Invalid, "the registry sent other bytes than %s", desc.Digest)
	}
	return b, nil
}
