package install

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/internal/release"
)

// TestSpread unpacks what was packed against another part, and nothing without that one, with
// another, or past the partition's end.
func TestSpread(t *testing.T) {
	base := make([]byte, 2<<20)
	for i := range base {
		base[i] = byte(rand.Uint32())
	}
	want := append(make([]byte, 1<<20), base...)
	want = append(want, make([]byte, 3<<20)...)
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(8<<20), zstd.WithEncoderDictRaw(release.BaseID, base))
	if err != nil {
		t.Fatal(err)
	}
	packed := z.EncodeAll(want, nil)
	z.Close()
	if len(packed) > 64<<10 {
		t.Errorf("packed it has %d bytes", len(packed))
	}
	other := bytes.Clone(base)
	for i := range other {
		other[i] ^= 1
	}
	for name, x := range map[string]struct {
		packed, base []byte
		limit        int64
		good         bool
	}{
		"as it was":   {packed, base, int64(len(want)), true},
		"none":        {packed, nil, int64(len(want)), false},
		"another":     {packed, other, int64(len(want)), false},
		"cut off":     {packed[:len(packed)/2], base, int64(len(want)), false},
		"too large":   {packed, base, int64(len(want)) - 1, false},
		"not needed":  {pack(t, want), base, int64(len(want)), true},
		"not against": {pack(t, want), nil, int64(len(want)), true},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "partition"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(int64(len(want))); err != nil {
				t.Fatal(err)
			}
			if err := spread(f, bytes.NewReader(x.packed), x.base, x.limit); (err == nil) != x.good {
				t.Errorf("%v", err)
			}
			got, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			if x.good && !bytes.Equal(got, want) {
				t.Error("it is something else")
			}
		})
	}
}

func pack(t *testing.T, b []byte) []byte {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(b, nil)
}
