// Package getter has the names of go-getter that grype and syft mention. It
// fetches nothing: databases are fetched by the scanner's own package vulndb.
package getter

import (
	"errors"
	"io"
	"net/http"
	"os"
)

// ErrAbsent is what every operation answers.
var ErrAbsent = errors.New("cannot download: this program has no downloader")

// Getter would fetch from one kind of address.
type Getter interface{ Absent() error }

type absent struct{}

func (absent) Absent() error { return ErrAbsent }

// HttpGetter would fetch by HTTP.
type HttpGetter struct {
	absent
	Client *http.Client
	Header http.Header
}

type (
	// FileGetter would copy a file.
	FileGetter struct{ absent }
	// GitGetter would clone.
	GitGetter struct{ absent }
	// GCSGetter would ask a cloud's store.
	GCSGetter struct{ absent }
	// HgGetter would clone.
	HgGetter struct{ absent }
	// S3Getter would ask a cloud's store.
	S3Getter struct{ absent }
)

// Client would fetch.
type Client struct {
	Src, Dst string
	Dir      bool
	Getters  map[string]Getter
	Options  []ClientOption
}

// Get refuses.
func (c *Client) Get() error { return ErrAbsent }

// ClientOption would change a Client.
type ClientOption func(*Client) error

// ProgressTracker would be told of progress.
type ProgressTracker interface {
	TrackProgress(src string, currentSize, totalSize int64, stream io.ReadCloser) (body io.ReadCloser)
}

// WithProgress changes nothing.
func WithProgress(ProgressTracker) func(*Client) error { return func(*Client) error { return nil } }

// Decompressor would unpack.
type Decompressor interface {
	Decompress(dst, src string, dir bool, umask os.FileMode) error
}

// Decompressors are none.
var Decompressors = map[string]Decompressor{}

// LimitedDecompressors are none.
func LimitedDecompressors(int, int64) map[string]Decompressor { return map[string]Decompressor{} }

// WithDecompressors changes nothing.
func WithDecompressors(map[string]Decompressor) ClientOption {
	return func(*Client) error { return nil }
}
