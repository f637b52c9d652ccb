// Package lazy serves layers whose contents are still in a registry. A process
// of its own mounts each such layer with FUSE as soon as the layer's table of
// contents is here, fetches what is read by ranges, proves every chunk against
// the table, and keeps all in a sparse file that in the end is the blob. The
// process outlives the engine that started it. Package image uses it for
// eStargz and zstd:chunked layers.
//
// Vocabulary: the table (of contents) is the index at the end of such a blob; a
// chunk is a piece of a file that is compressed by itself; a block is the unit in
// which the sparse file is filled; a layer is one mount, named by its chain id.
package lazy

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Argv0 is the name under which the program runs itself as Main.
const Argv0 = "servin-lazy"

// Annotations of layer descriptors that tell where the table is.
const (
	estargzDigest = "containerd.io/snapshot/stargz/toc.digest"
	zstdChecksum  = "io.github.containers.zstd-chunked.manifest-checksum"
	zstdPosition  = "io.github.containers.zstd-chunked.manifest-position"
	// The names that the eStargz library writes for the same.
	zstdChecksumOther = "io.containers.zstd-chunked.manifest-checksum"
	zstdPositionOther = "io.containers.zstd-chunked.manifest-position"
)

// Kind is a format of layers.
type Kind string

// Formats.
const (
	EStargz     Kind = "estargz"
	ZstdChunked Kind = "zstd:chunked"
)

// Blob describes a layer's blob and how its table is proved.
type Blob struct {
	Digest digest.Digest
	Size   int64
	Kind   Kind
	// Table is the digest of the table: of its JSON for eStargz, as it is
	// compressed for zstd:chunked.
	Table digest.Digest
	// Offset and Length are where the compressed table is; 0 for eStargz, whose
	// footer says so.
	Offset, Length int64 `json:",omitempty"`
}

// Describe tells whether a layer can be pulled lazily.
func Describe(d digest.Digest, size int64, mediaType string, annotations map[string]string) (Blob, bool) {
	b := Blob{Digest: d, Size: size}
	sum, pos := annotations[zstdChecksum], annotations[zstdPosition]
	if sum == "" {
		sum, pos = annotations[zstdChecksumOther], annotations[zstdPositionOther]
	}
	if sum != "" && strings.Contains(mediaType, "zstd") {
		f := strings.Split(pos, ":")
		if len(f) != 4 || f[3] != "1" {
			return b, false
		}
		var err1, err2 error
		b.Offset, err1 = strconv.ParseInt(f[0], 10, 64)
		b.Length, err2 = strconv.ParseInt(f[1], 10, 64)
		b.Kind, b.Table = ZstdChunked, digest.Digest(sum)
		ok := err1 == nil && err2 == nil && b.Offset > 0 && b.Length > 0 && b.Length <= maxTablePacked && b.Offset <= size-b.Length
		return b, ok && b.Table.Validate() == nil
	}
	if sum := annotations[estargzDigest]; sum != "" && !strings.Contains(mediaType, "zstd") {
		b.Kind, b.Table = EStargz, digest.Digest(sum)
		return b, b.Table.Validate() == nil
	}
	return b, false
}

// Source reads ranges of one blob.
type Source interface {
	// Range opens length bytes from off on.
	Range(ctx context.Context, off, length int64) (io.ReadCloser, error)
}

// Dial makes the Source of a blob from what the engine handed over.
type Dial func(access json.RawMessage, b Blob) (Source, error)

// Available tells whether this machine lets us mount with FUSE.
func Available() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
