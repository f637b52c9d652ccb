package vulndb

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Published is where grype's databases are.
const Published = "https://grype.anchore.io/databases"

const (
	maxListing = 1 << 20
	maxArchive = 4 << 30
)

// Latest is what is said of the newest database.
type Latest struct {
	Status   string    `json:"status"`
	Built    time.Time `json:"built"`
	Path     string    `json:"path"`
	Checksum string    `json:"checksum"`
	at       *url.URL
}

// Ask reads the listing below a base address.
func Ask(ctx context.Context, base string) (*Latest, error) {
	u, err := url.Parse(strings.TrimSuffix(base, "/") + "/v6/latest.json")
	if err != nil || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fault.New(fault.Invalid, "cannot fetch from %q: it is no http or https address", base)
	}
	body, _, err := get(ctx, u)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	l := &Latest{at: u}
	if err := json.NewDecoder(io.LimitReader(body, maxListing)).Decode(l); err != nil {
		return nil, fault.New(fault.Unavailable, "cannot read the list of databases at %s: %w", u.Redacted(), err)
	}
	if raw, err := hex.DecodeString(strings.TrimPrefix(l.Checksum, "sha256:")); err != nil || len(raw) != sha256.Size || l.Path == "" {
		return nil, fault.New(fault.Unavailable, "cannot use the list of databases at %s: it names no file with its SHA-256", u.Redacted())
	}
	return l, nil
}

// Download fetches the archive into f and checks it.
func (l *Latest) Download(ctx context.Context, f *os.File) error {
	u := *l.at
	u.Path = path.Join(path.Dir(u.Path), path.Clean("/"+l.Path))
	body, size, err := get(ctx, &u)
	if err != nil {
		return err
	}
	defer body.Close()
	if size > maxArchive {
		return fault.New(fault.Invalid, "the database is larger than %d bytes", int64(maxArchive))
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(body, maxArchive+1))
	if err != nil {
		return fault.New(fault.Unavailable, "cannot download %s: %w", u.Redacted(), err)
	}
	if n > maxArchive || hex.EncodeToString(h.Sum(nil)) != strings.TrimPrefix(l.Checksum, "sha256:") {
		return fault.New(fault.Unavailable, "what %s sent is not what its list says: the SHA-256 differs", u.Redacted())
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

func get(ctx context.Context, u *url.URL) (io.ReadCloser, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("User-Agent", "servin-scan")
	c := http.Client{CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) >= 10 {
			return errors.New("too many redirects")
		}
		if via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
			return fmt.Errorf("refused to go from https to %s", r.URL.Redacted())
		}
		return nil
	}}
	resp, err := c.Do(req)
	if err != nil {
		return nil, 0, fault.New(fault.Unavailable, "cannot fetch the database: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, 0, fault.New(fault.Unavailable, "cannot fetch %s: the server answers %s", u.Redacted(), resp.Status)
	}
	return resp.Body, resp.ContentLength, nil
}
