//! A recording of the fabric (pcap, Ethernet), as far as the demo looks into it. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A TCP segment with data.
pub(super) struct Segment {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: Vec<u8>,
}

/// A recording.
pub(super) struct Capture {
    /// Whole frames.
    pub packets: Vec<Vec<u8>>,
}

impl Capture {
    /// Reads a pcap of this machine's byte order, up to where it breaks off.
    pub fn parse(bytes: Vec<u8>) -> Self {
        let mut packets = Vec::new();
        let mut rest = bytes.get(24..).unwrap_or_default();
        while let Some(length) = rest
            .get(8..12)
            .and_then(|field| field.try_into().ok())
            .map(u32::from_ne_bytes)
        {
            let end = 16 + length as usize;
            let Some(frame) = rest.get(16..end) else { break };
            packets.push(frame.to_vec());
            rest = &rest[end..];
        }
        Self { packets }
    }

    /// Whether a text is in the frames: in one of them, or split over two segments of a connection.
    pub fn contains(&self, text: &str) -> bool {
        let has = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        if self.packets.iter().any(|packet| has(packet)) {
            return true;
        }
        let segments: Vec<_> = self.packets.iter().filter_map(|packet| segment(packet)).collect();
        let mut connections: std::collections::BTreeMap<_, Vec<u8>> = std::collections::BTreeMap::new();
        for segment in segments {
            connections
                .entry((segment.source, segment.destination))
                .or_default()
                .extend(segment.payload);
        }
        connections.values().any(|bytes| has(bytes))
    }

    /// The largest short segment of application data to the mesh's port.
    pub fn tunnelled(&self) -> Option<Segment> {
        let segments = self.packets.iter().filter_map(|packet| segment(packet));
        // A TLS record of application data begins 17 03 03.
        let of_mesh = segments
            .filter(|segment| segment.destination.port() == 15008 && segment.payload.starts_with(&[0x17, 3, 3]));
        of_mesh
            .filter(|segment| segment.payload.len() < 1000)
            .max_by_key(|segment| segment.payload.len())
    }
}

fn segment(frame: &[u8]) -> Option<Segment> {
    let (source, destination, tcp) = match u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?) {
        0x0800 => {
            let ip = frame.get(14..)?;
            let (header, total) = (
                usize::from(ip.first()? & 0x0f) * 4,
                u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?),
            );
            let address = |range: std::ops::Range<usize>| {
                Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(range)?).ok()?)))
            };
            if *ip.get(9)? != 6 {
                return None;
            }
            (
                address(12..16)?,
                address(16..20)?,
                ip.get(header..usize::from(total).min(ip.len()))?,
            )
        }
        0x86dd => {
            let ip = frame.get(14..)?;
            let address = |range: std::ops::Range<usize>| {
                Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(range)?).ok()?)))
            };
            let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
            if *ip.get(6)? != 6 {
                return None;
            }
            (
                address(8..24)?,
                address(24..40)?,
                ip.get(40..(40 + length).min(ip.len()))?,
            )
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
    (!payload.is_empty()).then_some(Segment {
        source: SocketAddr::new(source, port(0)?),
        destination: SocketAddr::new(destination, port(2)?),
        payload: payload.to_vec(),
    })
}

/// The first bytes, sixteen to a line.
pub(super) fn hexdump(bytes: &[u8], lines: usize) -> Vec<String> {
    let line = |(index, chunk): (usize, &[u8])| {
        let hex: String = chunk.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String = chunk
            .iter()
            .map(|byte| {
                if byte.is_ascii_graphic() {
                    char::from(*byte)
                } else {
                    '.'
                }
            })
            .collect();
        format!("{:04x}  {hex:<48} {text}", index * 16)
    };
    bytes.chunks(16).enumerate().take(lines).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_recordings_are_read_as_far_as_they_go() {
        for length in 0..120 {
            let bytes: Vec<u8> = (0..length).map(|at| (at * 7) as u8).collect();
            let capture = Capture::parse(bytes.clone());
            assert!(!capture.contains("nothing of the kind"));
            assert!(capture.tunnelled().is_none());
            segment(&bytes);
        }
    }

    #[test]
    fn a_segment_is_found() {
        let mut frame = vec![0; 12];
        frame.extend([
            0x08, 0x00, 0x45, 0, 0, 45, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend([
            0x10, 0, 0x3a, 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0, 0x17, 3, 3, 0, 0,
        ]);
        let capture = Capture { packets: vec![frame] };
        let found = capture.tunnelled().unwrap();
        assert_eq!(found.destination, "10.0.0.2:15008".parse().unwrap());
        assert_eq!(
            hexdump(&found.payload, 1),
            ["0000  17 03 03 00 00                                   ....."]
        );
    }
}
