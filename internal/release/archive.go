package release

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// An archive is a tar file: first the envelope, then the parts in the manifest's order.

// Pack writes an archive. open opens a part.
func Pack(w io.Writer, sealed []byte, m *Manifest, open func(p *Part) (io.ReadCloser, error)) error {
	t := tar.NewWriter(w)
	header := func(name string, size int64) error {
		return t.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR, ModTime: time.Unix(0, 0)})
	}
	if err := header(EnvelopeFile, int64(len(sealed))); err != nil {
		return err
	}
	if _, err := t.Write(sealed); err != nil {
		return err
	}
	buf := make([]byte, ChunkSize)
	for i := range m.Parts {
		p := &m.Parts[i]
		if err := header(p.Name, p.Size); err != nil {
			return err
		}
		r, err := open(p)
		if err != nil {
			return err
		}
		err = p.Copy(r, buf, func(piece []byte, _ int64) error { _, err := t.Write(piece); return err })
		if cerr := r.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
	return t.Close()
}

// Archive reads an archive from its beginning to its end.
type Archive struct {
	r      io.Reader
	t      *tar.Reader
	sealed []byte
}

// ReadArchive reads an archive's envelope.
func ReadArchive(r io.Reader) (*Archive, error) {
	a := &Archive{r: r, t: tar.NewReader(r)}
	h, err := a.next(EnvelopeFile)
	if err != nil {
		return nil, err
	}
	if h.Size > MaxEnvelope {
		return nil, fault.New(fault.Invalid, "the release's envelope has %d bytes", h.Size)
	}
	if a.sealed, err = io.ReadAll(io.LimitReader(a.t, MaxEnvelope)); err != nil {
		return nil, fmt.Errorf("cannot read the release: %w", err)
	}
	return a, nil
}

func (a *Archive) next(name string) (*tar.Header, error) {
	h, err := a.t.Next()
	switch {
	case errors.Is(err, io.EOF):
		return nil, fault.New(fault.Invalid, "the release ends before its %s", name)
	case errors.Is(err, tar.ErrHeader):
		return nil, fault.New(fault.Invalid, "this is no release (cloudos image build --format release makes one)")
	case err != nil:
		return nil, fmt.Errorf("cannot read the release: %w", err)
	case h.Typeflag != tar.TypeReg || h.Name != name:
		return nil, fault.New(fault.Invalid, "the release has %.100q where its %s should be", h.Name, name)
	}
	return h, nil
}

// Envelope is the archive's.
func (a *Archive) Envelope() []byte { return a.sealed }

// Open opens the next part, which must be p.
func (a *Archive) Open(p *Part) (io.ReadCloser, error) {
	h, err := a.next(p.Name)
	if err != nil {
		return nil, err
	}
	if h.Size != p.Size {
		return nil, fault.New(fault.Invalid, "the release's %s has %d bytes instead of %d", p.Name, h.Size, p.Size)
	}
	return io.NopCloser(a.t), nil
}

// End reads what is behind the last part: nothing but the archive's own end.
func (a *Archive) End() error {
	switch h, err := a.t.Next(); {
	case err == nil:
		return fault.New(fault.Invalid, "the release has %.100q behind its last part", h.Name)
	case !errors.Is(err, io.EOF):
		return fmt.Errorf("cannot read the release: %w", err)
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(a.r, 1<<20)); err != nil {
		return fmt.Errorf("cannot read the release: %w", err)
	}
	return nil
}
