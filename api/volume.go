package api

// VolumeArchive is what is known of an archive of a volume once it was written or
// read as a whole: the answer of POST /servin/volumes/{name}/restore, and the
// trailer of a backup.
type VolumeArchive struct {
	// Name is that of the volume that it was made of.
	Name string
	// SHA256 of the archive's content, and its size in bytes before compression.
	SHA256 string
	Bytes  int64
}

// VolumeClone is the body of POST /servin/volumes/{name}/clone.
type VolumeClone struct {
	// Name of the new volume.
	Name string
	// Pause holds the containers that run with the volume meanwhile.
	Pause bool `json:",omitempty"`
}

// HeaderVolumeSize tells, when a backup or an export was asked with size=1, how
// many bytes of files the volume has.
const HeaderVolumeSize = "Servin-Volume-Size"
